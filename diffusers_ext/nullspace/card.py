"""The model cards of statistics and of a pipeline that was taught a subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline

from diffusers_ext.core.pipelines import plain_class_name
from diffusers_ext.hub.card import Card, make_card

if TYPE_CHECKING:
    from diffusers_ext.nullspace.statistics import FeatureStatistics


def statistics_card(
    statistics: FeatureStatistics,
    *,
    base_model: str | None = None,
    trained_on: str | None = None,
    settings: Mapping[str, Any] | None = None,
    pipeline: str | None = None,
    num_prompts: int | None = None,
    example_prompts: Sequence[str] | None = None,
    **common: Any,
) -> Callable[..., Card]:
    """The card of statistics but for the repository's name.

    What is `None` comes from the statistics themselves, the licence from the base model's card.

    Args:
        pipeline: class of the measured pipeline.
        example_prompts: a few of the preserved prompts.
        common: further facts of every card, as of `make_card`.

    Raises:
        ValueError: a fact that is neither known nor given, as of statistics imported without facts.
    """
    facts = statistics.facts
    prompts = facts["prompts"]
    num_prompts = num_prompts or len(prompts) or None
    if trained_on is None and num_prompts is not None:
        counted = "1 prompt" if num_prompts == 1 else f"{num_prompts} prompts"
        trained_on = f"What {len(statistics.linears)} linear layers read for {counted}."
    tensors = statistics._to_artifact()[1].values()
    return make_card(
        "feature_statistics",
        base_model=base_model or facts.get("base_model") or None,
        trained_on=trained_on,
        settings=collection_settings(facts) if settings is None else settings,
        pipeline=pipeline or facts.get("pipeline"),
        num_prompts=num_prompts,
        example_prompts=list(example_prompts or prompts[:5]),
        layers=len(statistics.layers),
        megabytes=sum(tensor.nbytes for tensor in tensors) / 1e6,
        **common,
    )


def collection_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a collection that a card shows, each one value."""
    settings = dict(facts["settings"])
    settings |= settings.pop("run", {})
    settings.pop("scheduler", None)  # many values; the artifact's config has them
    if "compressed_energy" in facts:
        settings["compressed_energy"] = facts["compressed_energy"]
    shown = {}
    for name, value in settings.items():
        value = ", ".join(map(str, value)) if isinstance(value, list) else value
        if value is not None and value != "" and not isinstance(value, dict):
            shown[name] = value
    return shown


def subject_pipeline_card(
    pipeline: DiffusionPipeline,
    *,
    instance_prompt: str | None = None,
    base_model: str | None = None,
    statistics: bool | None = None,
    **common: Any,
) -> Callable[..., Card]:
    """The card of whole weights, with the statistics they were trained under where there are any.

    Args:
        instance_prompt: asks for the subject.
        base_model: Hub name of the model it was made from; where the pipeline, or its statistics, came from when
            `None`.
        statistics: whether the repository has `statistics/`; as the pipeline has them when `None`.
        common: further facts of every card, as of `make_card`.

    Raises:
        ValueError: a fact that is neither known nor given.
    """
    component = getattr(pipeline, "statistics", None)
    return make_card(
        "subject_pipeline",
        base_model=base_model or _base_of(pipeline),
        instance_prompt=instance_prompt,
        pipeline=plain_class_name(pipeline),
        statistics=component is not None if statistics is None else statistics,
        **common,
    )


def _base_of(pipeline: DiffusionPipeline) -> str | None:
    statistics = getattr(pipeline, "statistics", None)
    if statistics is not None and statistics.facts.get("base_model"):
        return statistics.facts["base_model"]
    source = pipeline.config.get("_name_or_path")
    # A folder may well be the trained pipeline itself.
    return source if source and not Path(source).exists() else None
