"""The card of an artifact: a header that the Hub understands, and a text that people understand."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffusers_ext.hub.kinds import (
    HUB_NAME,
    KINDS,
    Kind,
    Licence,
    Measured,
    bibtex,
    check_common,
    check_facts,
    check_lists,
    find_licence,
    public_name,
    slug,
)
from diffusers_ext.hub.owner_text import mark_generated
from diffusers_ext.hub.safe_markdown import code, count, figure, plain, prose, python_literal, shown

Card = ModelCard | DatasetCard

_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {function.__name__: function for function in (plain, code, count, figure, prose, shown)}
    environment.filters |= {**filters, "py": python_literal}
    return environment


def _model_header(
    kind: Kind,
    model_name: str,
    base_model: str | None,
    licence: Licence,
    results: Sequence[Measured],
    widget: Sequence[tuple[str, str]],
    facts: Mapping[str, Any],
) -> ModelCardData:
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
        **vars(licence),
        instance_prompt=facts.get("instance_prompt") or None,
        tags=tags,
        widget=[{"text": prompt, "output": {"url": file}} for prompt, file in widget] or None,
        model_name=model_name if evaluated else None,
        eval_results=evaluated or None,
    )


def _data_set_header(kind: Kind, licence: Licence, num_rows: int, prefix: str) -> DatasetCardData:
    """By which `datasets` finds the tables of a repository with noise pairs."""
    size = next((name for most, name in _SIZES.items() if num_rows < most), "n>10M")
    return DatasetCardData(
        **vars(licence),
        task_categories=["text-to-image"],
        size_categories=[size],
        tags=[*kind.tags],
        configs=[
            {"config_name": "pairs", "default": True, "data_files": f"{prefix}pairs/*.parquet"},
            {"config_name": "rejected", "data_files": f"{prefix}rejected/*.parquet"},
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
) -> Card:
    """The card of one artifact, without network. What nobody says is an error, not a gap.

    Args:
        kind: a key of `KINDS`.
        repo_id: where the artifact is going to be, `"user/name"`.
        base: Hub name of the base model, or a label for one that is not on the Hub.
        trained_on: what it was made from, as Markdown.
        settings: how it was made: names and numbers or words; empty leaves the table out.
        results: what was measured; empty says that nothing was.
        widget: prompts with the picture or clip of each, a file of the repository; may be empty.
        facts: the kind's own, all of `KINDS[kind].facts`.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {list(KINDS)}, got {kind!r}.")
    found = KINDS[kind]
    check_common(repo_id, base, licence, trained_on, version)
    check_lists(settings, results, widget)
    check_facts(kind, found, facts)
    name, subfolder = repo_id.split("/")[1], (subfolder or "").strip("/")
    prefix = f"{subfolder}/" if subfolder else ""
    on_hub = bool(HUB_NAME.fullmatch(base))
    if found.repo_type == "dataset":
        card_class, data = DatasetCard, _data_set_header(found, licence, facts["num_pairs"], prefix)
    else:
        base_model = base if on_hub else None
        data = _model_header(found, name, base_model, licence, results, widget, facts)
        card_class = ModelCard
    # The arguments of a `from_pretrained`, and a downloaded folder for what has no `subfolder`.
    where, snapshot = python_literal(repo_id), f"snapshot_download({python_literal(repo_id)})"
    if subfolder:
        where += f", subfolder={python_literal(subfolder)}"
        snapshot += f" + {python_literal('/' + subfolder)}"
    template = _environment().get_template(f"{kind}.jinja")
    words = template.render(
        name=f"{name}/{subfolder}" if subfolder else name,
        repo_id=repo_id,
        prefix=prefix,
        where=where,
        snapshot=snapshot,
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
    words = re.sub(r"\n{3,}", "\n\n", words.replace("\r\n", "\n"))
    return card_class(f"---\n{data.to_yaml()}\n---\n\n{mark_generated(words, subfolder)}\n")


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
        base_model: Hub name or folder of the model that the artifact is for; of a folder the card names only the last
            part.
        license: as of the base model when `None`.
        widget: (prompt, file of the folder to upload) of pictures or clips to show.
        token: to read the base model's card.
        facts: those of the kind; `None` stands for a fact that is not known, which is a `ValueError`.
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
