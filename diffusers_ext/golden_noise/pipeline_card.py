"""What the model card of a golden-noise pipeline tells, from the pipeline and where it came from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffusers_ext.golden_noise.network_card import GOLDEN_PIPELINES, read_pipeline_class
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.hub.licence import public_name


def pipeline_card(
    pipeline: DiffusionPipeline,
    *,
    base_model: str | os.PathLike | None = None,
    trained_on: str | None = None,
    token: str | None = None,
    **common: Any,
) -> Callable[..., Card]:
    """The card of a pipeline but for the name of its repository.

    Args:
        pipeline: one of the five of this package.
        base_model: Hub name, folder or label of the plain model; where the pipeline was loaded from
            when `None`, if that was a plain model on the Hub.
        trained_on: the noises its network was trained on; needless without a network.
        token: to read the base model.
        common: further facts of every card, as of `make_card`.

    Raises:
        ValueError: a fact that is neither given nor known, or a LoRA is loaded.
    """
    name, plain = _family(pipeline)
    adapted = [key for key, part in pipeline.components.items() if getattr(part, "peft_config", 0)]
    if adapted:
        raise ValueError(
            f"A pipeline to upload must have no LoRA loaded, got one in {adapted}: its files would "
            "not load. Upload the LoRA by itself, or fuse it and `unload_lora_weights()` first."
        )
    network = pipeline.noise_model
    if base_model is None:
        base_model = _plain_origin(pipeline, token)
    if network is None and trained_on is None:
        trained_on = f"Nothing: these are the weights of {public_name(base_model)}."
    return make_card(
        "golden_noise_pipeline",
        base_model=base_model,
        trained_on=trained_on,
        token=token,
        pipeline=name,
        plain_pipeline=plain,
        # Not `None`, which stands for what is not known.
        network="" if network is None else type(network).__name__,
        parameters=0 if network is None else sum(p.numel() for p in network.parameters()),
        **common,
    )


def _family(pipeline: DiffusionPipeline) -> tuple[str, str]:
    """Names of the golden and of the plain class."""
    names = [parent.__name__ for parent in type(pipeline).__mro__]
    for plain, golden in GOLDEN_PIPELINES.items():
        if golden in names:
            return golden, plain
    raise ValueError(
        f"`pipeline` must be one of {sorted(GOLDEN_PIPELINES.values())}, got a {names[0]}."
    )


def _plain_origin(pipeline: DiffusionPipeline, token: str | None) -> str:
    """Where the pipeline was loaded from; not from a golden one, which has a base of its own."""
    name = pipeline.name_or_path
    if name and not Path(name).exists() and read_pipeline_class(name, token) in GOLDEN_PIPELINES:
        return name
    raise ValueError(
        "`base_model` must be given for the card of a pipeline that was not loaded from a plain "
        "one on the Hub, got None. Pass the Hub name of the plain model."
    )
