"""The model card of a concept eraser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.legacy import StateDict, eraser_shape
from diffusers_ext.families.cogvideox import CogVideoX
from diffusers_ext.hub.card import Card, make_card


def eraser_card(
    tensors: StateDict,
    *,
    concept: str | None = None,
    anchor_concept: str | None = None,
    preserved_concepts: Sequence[str] | None = None,
    **common: Any,
) -> Callable[..., Card]:
    """The card of an eraser but for the repository's name.

    Args:
        anchor_concept: what takes its place; nothing in particular when `None`.
        preserved_concepts: those that the training kept on purpose; empty when there were none.
        common: facts of every card, as of `make_card`.

    Raises:
        ValueError: a fact that is not given.
    """
    return make_card(
        "eraser",
        concept=concept,
        anchor_concept=anchor_concept or "",
        preserved_concepts=None if preserved_concepts is None else list(preserved_concepts),
        pipeline=CogVideoX.pipelines[0],
        rank=eraser_shape(tensors).rank,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        **common,
    )


def facts_of_config(config: EraserConfig) -> dict[str, Any]:
    """What an eraser's config knows of the facts for its card; `None` for what it does not."""
    base = config.base_model_name_or_path or ""
    if base.count("/") > 1:  # more than a name on the Hub: a folder of the pipeline
        base = base.removesuffix("/transformer")
    return {"concept": config.concept, "anchor_concept": config.anchor_concept, "base_model": base or None}
