"""How many parameters an eraser has, and the published CogVideoX transformers it may be for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def transformer_width(transformer_config: Mapping[str, Any]) -> int:
    """Width of the tokens between the blocks, `num_attention_heads * attention_head_dim`.

    Args:
        transformer_config: of a `CogVideoXTransformer3DModel`; the head width is 64 when absent.
    """
    heads = int(transformer_config["num_attention_heads"])
    return heads * int(transformer_config.get("attention_head_dim", 64))


def check_rank(rank: int, width: int) -> None:
    """Raise `ValueError` unless `1 <= rank <= width`."""
    if not 1 <= rank <= width:
        raise ValueError(
            f"`rank` must be from 1 to the transformer's width {width}, got {rank}. "
            "128 is usual for the published models."
        )


def eraser_size(
    transformer_config: Mapping[str, Any], rank: int, num_layers: int | None = None
) -> int:
    """Parameters of an eraser, `num_layers * (2 width rank + rank + width)`.

    Two Linears with bias in every block, `width -> rank -> width`.

    Args:
        transformer_config: of a `CogVideoXTransformer3DModel`, or one of `PUBLISHED_TRANSFORMERS`.
        rank: inner width of the eraser.
        num_layers: blocks that carry one; all when `None`.

    Raises:
        ValueError: a rank below 1 or above the width, or more layers than the transformer has.
    """
    width, blocks = transformer_width(transformer_config), int(transformer_config["num_layers"])
    check_rank(rank, width)
    layers = blocks if num_layers is None else num_layers
    if not 1 <= layers <= blocks:
        raise ValueError(
            f"`num_layers` must be from 1 to the transformer's {blocks}, got {num_layers}."
        )
    return layers * (2 * width * rank + rank + width)
