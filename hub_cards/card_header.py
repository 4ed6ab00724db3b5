"""The YAML header of a card, by which the Hub finds, filters and shows a repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import CardData, DatasetCardData, EvalResult, ModelCardData

from hub_cards.card_facts import Licence, Measured, slug
from hub_cards.kinds import Kind


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
