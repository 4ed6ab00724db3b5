"""The model card of a pipeline that was taught a subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffusers_ext.hub import Licence, Measured
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.nullspace.measured_models import plain_class_name


def subject_pipeline_card(
    pipeline: DiffusionPipeline,
    *,
    instance_prompt: str | None = None,
    base_model: str | None = None,
    license: str | Licence | None = None,
    trained_on: str | None = None,
    settings: Mapping[str, Any] | None = None,
    results: Sequence[Measured] = (),
    widget: Sequence[tuple[str, str]] = (),
    statistics: bool | None = None,
    token: str | None = None,
) -> Callable[..., Card]:
    """The card of whole weights, with the statistics they were trained under where there are any.

    Args:
        pipeline: to describe.
        instance_prompt: asks for the subject.
        base_model: Hub name of the model it was made from; where the pipeline, or its statistics, came
            from when `None`.
        license: as of the base model when `None`.
        trained_on: the pictures it was trained on, in words.
        settings: of the training.
        results: measured figures.
        widget: (prompt, file in the repository) of pictures.
        statistics: whether the repository has `statistics/`; as the pipeline has them when `None`.
        token: to read the base model's card.

    Raises:
        ValueError: a fact that is neither known nor given.
    """
    component = getattr(pipeline, "statistics", None)
    return make_card(
        "subject_pipeline",
        base_model=base_model or _base_of(pipeline),
        license=license,
        trained_on=trained_on,
        settings=settings,
        results=results,
        widget=widget,
        token=token,
        instance_prompt=instance_prompt,
        pipeline=plain_class_name(pipeline),
        statistics=component is not None if statistics is None else statistics,
    )


def _base_of(pipeline: DiffusionPipeline) -> str | None:
    statistics = getattr(pipeline, "statistics", None)
    if statistics is not None and statistics.facts.get("base_model"):
        return statistics.facts["base_model"]
    source = pipeline.config.get("_name_or_path")
    # A folder may well be the trained pipeline itself.
    return source if source and not Path(source).exists() else None
