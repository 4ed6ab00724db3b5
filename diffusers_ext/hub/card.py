"""The card of an artifact: a header that the Hub understands, and a text that people understand."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CardData,
    DatasetCard,
    DatasetCardData,
    EvalResult,
    ModelCard,
    ModelCardData,
)
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateNotFound
from jinja2.exceptions import UndefinedError

from diffusers_ext.hub.kinds import (
    HUB_NAME,
    KINDS,
    Kind,
    Measured,
    bibtex,
    check_common,
    check_facts,
    check_lists,
    slug,
)
from diffusers_ext.hub.licence import Licence, find_licence, public_name
from diffusers_ext.hub.owner_text import mark_generated
from diffusers_ext.hub.safe_markdown import code, count, figure, plain, prose, python_literal, shown


Card = ModelCard | DatasetCard
_TEMPLATES = Path(__file__).parent / "templates"


def render(
    template: str, data: CardData, *, subfolder: str = "", **facts: Any
) -> ModelCard | DatasetCard:
    """The card of one template, without network.

    Args:
        template: name of a file in `templates/`, without its ending.
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


_SIZES = {
    1_000: "n<1K",
    10_000: "1K<n<10K",
    100_000: "10K<n<100K",
    1_000_000: "100K<n<1M",
    10_000_000: "1M<n<10M",
}


def model_header(
    kind: Kind,
    *,
    model_name: str,
    base_model: str | None,
    licence: Licence,
    results: Sequence[Measured],
    widget: Sequence[tuple[str, str]],
    facts: Mapping[str, Any],
) -> CardData:
    """The header of a model repository.

    Args:
        kind: of the artifact.
        model_name: under which the measured figures stand.
        base_model: a Hub name; `None` leaves it out.
        licence: of the artifact.
        results: what was measured.
        widget: prompts with a picture or clip of each.
        facts: the kind's own.
    """
    tags = [*kind.tags]
    if facts.get("directions", "plain") != "plain":
        tags.append("null-space-lora")
    evaluated = [
        EvalResult(
            task_type=kind.pipeline_tag or "other",
            dataset_type=slug(result.dataset),
            dataset_name=result.dataset,
            metric_type=slug(result.metric),
            metric_value=float(result.value),
            metric_name=result.name or result.metric,
        )
        for result in results
    ]
    return ModelCardData(
        base_model=base_model,
        base_model_relation=kind.relation if base_model else None,
        library_name=kind.library_name,
        pipeline_tag=kind.pipeline_tag,
        license=licence.license,
        license_name=licence.license_name,
        license_link=licence.license_link,
        instance_prompt=facts.get("instance_prompt") or None,
        tags=tags,
        widget=[{"text": prompt, "output": {"url": file}} for prompt, file in widget] or None,
        model_name=model_name if evaluated else None,
        eval_results=evaluated or None,
    )


def data_set_header(kind: Kind, *, licence: Licence, num_rows: int, folder: str) -> CardData:
    """The header of a repository with noise pairs, by which `datasets` finds the tables.

    Args:
        kind: of the artifact.
        licence: of the data.
        num_rows: pairs in it.
        folder: of the repository, empty for its root.
    """
    size = next((name for most, name in _SIZES.items() if num_rows < most), "n>10M")
    where = f"{folder}/" if folder else ""
    return DatasetCardData(
        license=licence.license,
        license_name=licence.license_name,
        license_link=licence.license_link,
        task_categories=["text-to-image"],
        size_categories=[size],
        tags=[*kind.tags],
        configs=[
            {"config_name": "pairs", "default": True, "data_files": f"{where}pairs/*.parquet"},
            {"config_name": "rejected", "data_files": f"{where}rejected/*.parquet"},
        ],
    )


def artifact_card(
    kind: str,
    repo_id: str,
    *,
    base: str,
    licence: Licence,
    trained_on: str,
    settings: Mapping[str, object],
    results: Sequence[Measured],
    widget: Sequence[tuple[str, str]],
    version: str,
    subfolder: str | None = None,
    **facts: Any,
) -> ModelCard | DatasetCard:
    """The card of one artifact, without network. What nobody says is an error, not a gap.

    Args:
        kind: a key of `KINDS`.
        repo_id: where the artifact is going to be, `"user/name"`.
        base: Hub name of the base model, or a label for one that is not on the Hub.
        licence: of the artifact.
        trained_on: what it was made from, as Markdown.
        settings: how it was made: names and numbers or words; empty leaves the table out.
        results: what was measured; empty says that nothing was.
        widget: prompts with the picture or clip of each, a file of the repository; may be empty.
        version: of diffusers_ext.
        subfolder: of the repository, where the artifact is not in its root.
        facts: the kind's own, all of `KINDS[kind].facts`.

    Raises:
        ValueError: a fact is missing, unknown or empty.
        TypeError: an argument is missing or of a wrong type.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {list(KINDS)}, got {kind!r}.")
    found = KINDS[kind]
    check_common(repo_id, base, licence, trained_on, version)
    check_lists(settings, results, widget)
    check_facts(kind, found, facts)
    name, subfolder = repo_id.split("/")[1], (subfolder or "").strip("/")
    on_hub = bool(HUB_NAME.fullmatch(base))
    if found.repo_type == "dataset":
        data = data_set_header(
            found, licence=licence, num_rows=facts["num_pairs"], folder=subfolder
        )
    else:
        data = model_header(
            found,
            model_name=name,
            base_model=base if on_hub else None,
            licence=licence,
            results=results,
            widget=widget,
            facts=facts,
        )
    return render(
        found.template,
        data,
        subfolder=subfolder,
        name=f"{name}/{subfolder}" if subfolder else name,
        repo_id=repo_id,
        prefix=f"{subfolder}/" if subfolder else "",
        where=_arguments(repo_id, subfolder),
        snapshot=_snapshot(repo_id, subfolder),
        base=base,
        on_hub=on_hub,
        licence=licence,
        trained_on=trained_on.strip(),
        settings=settings,
        results=results,
        noted=any(result.notes for result in results),
        widget=widget,
        version=version,
        citations=bibtex(found.papers, version),
        **facts,
    )


def _arguments(repo_id: str, subfolder: str) -> str:
    """What a `from_pretrained` of one file is called with."""
    folder = f", subfolder={python_literal(subfolder)}" if subfolder else ""
    return python_literal(repo_id) + folder


def _snapshot(repo_id: str, subfolder: str) -> str:
    """A downloaded folder, for what loads from the Hub's root alone or not without this package."""
    folder = f" + {python_literal('/' + subfolder)}" if subfolder else ""
    return f"snapshot_download({python_literal(repo_id)}){folder}"


def make_card(
    kind: str,
    *,
    base_model: str | os.PathLike | None = None,
    license: str | Licence | None = None,
    trained_on: str | None = None,
    settings: Mapping[str, Any] | None = None,
    results: Sequence[Measured] = (),
    widget: Sequence[tuple[str, str]] = (),
    token: str | None = None,
    **facts: Any,
) -> Callable[..., Card]:
    """A card but for the name of its repository, as `push_folder` takes it.

    Args:
        kind: one of `KINDS`.
        base_model: Hub name or folder of the model that the artifact is for; of a folder the card
            names only the last part.
        license: as of the base model when `None`.
        trained_on: what it was trained on or made from, in words.
        settings: those that matter for what came out.
        widget: (prompt, file of the folder to upload) of pictures or clips to show.
        token: to read the base model's card.
        facts: those of the kind; `None` stands for a fact that is not known.

    Raises:
        ValueError: a fact is not known or no fact of this kind, or no licence is found.
    """
    known = {"base_model": base_model, "trained_on": trained_on, **facts}
    missing = sorted(name for name, value in known.items() if value is None)
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise ValueError(
            f"{names} must be given for the card, got None. An upload of kind {kind!r} tells what it "
            "is and where it comes from: pass these facts with the other arguments."
        )
    given = {"kind": kind, "base": public_name(base_model), "trained_on": trained_on, **facts}
    given["licence"] = find_licence(base_model, license, token=token)
    given |= {"settings": dict(settings or {}), "results": tuple(results)}
    given["version"] = sys.modules["diffusers_ext"].__version__  # whole by now, unlike at import

    def card(repo_id: str, subfolder: str | None = None) -> Card:
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        pictures = [(prompt, f"{prefix}{file}") for prompt, file in widget]
        return artifact_card(repo_id=repo_id, widget=pictures, subfolder=subfolder, **given)

    card("user/name")  # what is wrong with the facts stops here, before anything is written
    return card
