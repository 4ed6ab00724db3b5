"""Fill a card's template: every placeholder must have its fact."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import CardData, DatasetCard, DatasetCardData, ModelCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateNotFound
from jinja2.exceptions import UndefinedError

from hub_cards.generated_block import mark_generated
from hub_cards.safe_markdown import check_file_name, code, plain, prose


_TEMPLATES = Path(__file__).parent / "templates"


def render(
    template: str, data: CardData, *, subfolder: str = "", **facts: Any
) -> ModelCard | DatasetCard:
    """The card of one template, without network.

    Args:
        template: name of a file in `hub_cards/templates`, without its ending.
        data: the card's YAML header; entries that are `None` are left out.
        subfolder: of the repository, that the card is about.
        facts: what the template's placeholders stand for.

    Raises:
        ValueError: no such template, or a fact that it needs is missing.
    """
    try:
        words = _environment().get_template(f"{template}.jinja").render(facts)
    except TemplateNotFound as error:
        present = sorted(found.stem for found in _TEMPLATES.glob("[!_]*.jinja"))
        raise ValueError(f"`template` must be one of {present}, got {template!r}.") from error
    except UndefinedError as error:
        raise ValueError(
            f"`facts` must hold all that the template {template!r} shows, got {sorted(facts)}: "
            f"{error}."
        ) from error
    card_class = DatasetCard if isinstance(data, DatasetCardData) else ModelCard
    words = re.sub(r"\n{3,}", "\n\n", words.replace("\r\n", "\n"))
    return card_class(f"---\n{data.to_yaml()}\n---\n\n{mark_generated(words, subfolder)}\n")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": plain,
        "code": code,
        "py": python_literal,
        "count": count,
        "figure": figure,
        "prose": prose,
        "shown": shown,
    }
    return environment


def python_literal(words: str) -> str:
    """Words as a Python string in double quotes."""
    return json.dumps(str(words), ensure_ascii=False)


def count(number: int) -> str:
    """A whole number with commas."""
    return f"{int(number):,}"


def figure(value: float) -> str:
    """A measured figure with four digits; a whole number, or a large one, with all before the point."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def shown(file: str) -> str:
    """A file of the repository: a picture as such, anything else as a link."""
    address = quote(check_file_name(file, "widget"))
    is_picture = address.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".gif"))
    return f"![{plain(file)}]({address})" if is_picture else f"[{plain(file)}]({address})"
