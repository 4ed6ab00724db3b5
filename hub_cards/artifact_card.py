"""The card of an artifact: a header that the Hub understands, and a text that people understand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import (
    CardData,
    DatasetCard,
    DatasetCardData,
    EvalResult,
    ModelCard,
    ModelCardData,
)

from hub_cards.card_facts import Licence, Measured, slug
from hub_cards.citations import bibtex
from hub_cards.kinds import CHOICES, CLASS_FACTS, KINDS, Kind
from hub_cards.render import python_literal, render


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


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
    _check_common(repo_id, base, licence, trained_on, version)
    _check_lists(settings, results, widget)
    _check_facts(kind, found, facts)
    on_hub = bool(_HUB_NAME.fullmatch(base))
    widget = [(str(prompt), str(file)) for prompt, file in widget]
    header = _dataset_header if found.repo_type == "dataset" else _model_header
    data = header(
        found,
        repo_id,
        base=base if on_hub else None,
        licence=licence,
        results=results,
        widget=widget,
        subfolder=subfolder,
        facts=facts,
    )
    return render(
        found.template,
        data,
        repo_id=repo_id,
        name=repo_id.split("/")[1],
        subfolder=subfolder or "",
        prefix=f"{subfolder}/" if subfolder else "",
        where=_python_place(repo_id, subfolder),
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


def _python_place(repo_id: str, subfolder: str | None) -> str:
    """Arguments of a `from_pretrained`."""
    folder = f", subfolder={python_literal(subfolder)}" if subfolder else ""
    return python_literal(repo_id) + folder


def _check_common(repo_id: str, base: str, licence: Licence, trained_on: str, version: str) -> None:
    if not isinstance(repo_id, str) or not _HUB_NAME.fullmatch(repo_id):
        raise ValueError(f"`repo_id` must be 'user/name', got {repo_id!r}.")
    if not isinstance(licence, Licence):
        raise TypeError(f"`licence` must be a Licence, got a {type(licence).__name__}.")
    for name, value in (("base", base), ("trained_on", trained_on), ("version", version)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"`{name}` must be given in words for a card, got {value!r}.")


def _check_lists(
    settings: Mapping[str, object],
    results: Sequence[Measured],
    widget: Sequence[tuple[str, str]],
) -> None:
    for name, value in settings.items():
        if not isinstance(value, (str, int, float, bool)):
            raise TypeError(
                f"`settings` must hold numbers and words, got a {type(value).__name__} for "
                f"{name!r}."
            )
    for result in results:
        if not isinstance(result, Measured):
            raise TypeError(f"`results` must hold Measured, got a {type(result).__name__}.")
    for pair in widget:
        if len(pair) != 2 or isinstance(pair, str):
            raise ValueError(f"`widget` must hold pairs of prompt and file, got {pair!r}.")


def _check_facts(kind: str, found: Kind, facts: Mapping[str, Any]) -> None:
    for name in found.facts:
        if name not in facts:
            raise ValueError(
                f"`{name}` must be given for a card of kind {kind!r}, got only {sorted(facts)}."
            )
        empty = facts[name] is None or facts[name] == ""
        if empty and name not in found.may_be_empty:
            raise ValueError(f"`{name}` must say something in a card, got {facts[name]!r}.")
        if name in CLASS_FACTS and not empty and not str(facts[name]).isidentifier():
            raise ValueError(f"`{name}` must be the name of a class, got {facts[name]!r}.")
        if name in CHOICES and facts[name] not in CHOICES[name]:
            raise ValueError(f"`{name}` must be one of {CHOICES[name]}, got {facts[name]!r}.")
    unknown = sorted(facts.keys() - set(found.facts))
    if unknown:
        raise ValueError(f"A card of kind {kind!r} must have {found.facts}, got also {unknown}.")


def _model_header(
    found: Kind,
    repo_id: str,
    *,
    base: str | None,
    licence: Licence,
    results: Sequence[Measured],
    widget: Sequence[tuple[str, str]],
    subfolder: str | None,
    facts: Mapping[str, Any],
) -> CardData:
    tags = [*found.tags]
    if facts.get("directions", "plain") != "plain":
        tags.append("null-space-lora")
    evaluated = [
        EvalResult(
            task_type=found.pipeline_tag or "other",
            dataset_type=slug(result.dataset),
            dataset_name=result.dataset,
            metric_type=slug(result.metric),
            metric_value=float(result.value),
            metric_name=result.name or result.metric,
        )
        for result in results
    ]
    return ModelCardData(
        base_model=base,
        base_model_relation=found.relation if base else None,
        library_name=found.library_name,
        pipeline_tag=found.pipeline_tag,
        license=licence.license,
        license_name=licence.license_name,
        license_link=licence.license_link,
        instance_prompt=facts.get("instance_prompt"),
        tags=tags,
        widget=[{"text": prompt, "output": {"url": file}} for prompt, file in widget] or None,
        model_name=repo_id.split("/")[1] if evaluated else None,
        eval_results=evaluated or None,
    )


def _dataset_header(
    found: Kind,
    repo_id: str,
    *,
    base: str | None,
    licence: Licence,
    results: Sequence[Measured],
    widget: Sequence[tuple[str, str]],
    subfolder: str | None,
    facts: Mapping[str, Any],
) -> CardData:
    size = next((name for most, name in _SIZES if facts["num_pairs"] < most), "1M<n<10M")
    where = f"{subfolder}/" if subfolder else ""
    return DatasetCardData(
        license=licence.license,
        license_name=licence.license_name,
        license_link=licence.license_link,
        task_categories=["text-to-image"],
        size_categories=[size],
        tags=[*found.tags],
        configs=[
            {"config_name": "pairs", "default": True, "data_files": f"{where}pairs/*.parquet"},
            {"config_name": "rejected", "data_files": f"{where}rejected/*.parquet"},
        ],
    )
