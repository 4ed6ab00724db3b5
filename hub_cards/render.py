"""Fill a model-card template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, data: ModelCardData, **facts: Any) -> ModelCard:
    """The card of one template, without network.

    Args:
        template: name of a file in `hub_cards/templates`, without its ending.
        data: the card's YAML header; entries that are `None` are left out.
        facts: what the template's placeholders stand for.

    Raises:
        ValueError: no such template.
    """
    path = _TEMPLATES / f"{template}.md.jinja"
    if not path.is_file():
        present = sorted(found.name.split(".")[0] for found in _TEMPLATES.glob("*.md.jinja"))
        raise ValueError(f"`template` must be one of {present}, got {template!r}.")
    return ModelCard.from_template(data, template_path=str(path), **facts)
