"""The model card of a pipeline that was taught a subject."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.nullspace.measured_models import plain_class_name


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
        base_model: Hub name of the model it was made from; where the pipeline, or its statistics, came
            from when `None`.
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
