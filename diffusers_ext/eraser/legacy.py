"""Eraser weights by name, as PEFT and as the T2VUnlearning code spell them; whether they fit a model.

Behaviour of the legacy format: TobisawaMisakii/T2VUnlearning@f626c6f10f72c611d2ab739ff23c1a933a1671d0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from diffusers_ext.core.tensor_files import FLOATING
from diffusers_ext.families.registry import families_of

LEGACY_TYPE = "adapter"
PEFT_PREFIX = "base_model.model."
StateDict = dict[str, torch.Tensor]
# Name in the legacy file -> module of the layer and its parameter.
PARTS = {
    "down.weight": ("eraser_down", "weight"),
    "down.bias": ("eraser_down", "bias"),
    "up.weight": ("eraser_up", "weight"),
    "up.bias": ("eraser_up", "bias"),
}
_LEGACY_KEY = re.compile(r"(transformer_blocks\.\d+\.attn1)\.adapter")
_KEY = r"((?:{blocks})\.(\d+)\.(?:{attentions}))\.to_out\.1\.eraser_(down|up)\.(weight|bias)"


class EraserShape(NamedTuple):
    """What the tensors of an eraser say about the model it is for.

    Attributes:
        width: of the transformer's tokens.
        rank: inner width of the eraser.
        blocks: numbers of the transformer blocks that carry one, ascending.
    """

    width: int
    rank: int
    blocks: tuple[int, ...]


def layer_name(attention: str, part: str) -> str:
    """Name in the transformer of one tensor; `layer_name("transformer_blocks.0.attn1", "up.bias")`."""
    return f"{attention}.to_out.1.{'.'.join(PARTS[part])}"


def from_legacy(tree: Any, source: str = "`tree`") -> StateDict:
    """The legacy dictionary `{block: {part: tensor}}` under the names in the transformer.

    Blocks are `transformer_blocks.{i}.attn1.adapter`; parts `down.weight` `(rank, dim)`, `down.bias` `(rank,)`,
    `up.weight` `(dim, rank)` and `up.bias` `(dim,)`. Errors begin with `source`.

    Raises:
        ValueError: anything else, such as the eraser of another model family.
    """
    if not isinstance(tree, Mapping) or not tree:
        found = "an empty dictionary" if isinstance(tree, Mapping) else f"a {type(tree).__name__}"
        raise ValueError(f"{source} must hold a dictionary of erasers, got {found}.")
    tensors = {}
    for key, parts in tree.items():
        name = _LEGACY_KEY.fullmatch(str(key))
        if name is None:
            raise ValueError(
                f"Every key of {source} must be transformer_blocks.<i>.attn1.{LEGACY_TYPE}, got "
                f"{key!r}. Only erasers of CogVideoX can be loaded."
            )
        if not isinstance(parts, Mapping) or set(parts) != set(PARTS):
            found = sorted(map(str, parts)) if isinstance(parts, Mapping) else type(parts).__name__
            raise ValueError(f"{source}: `{key}` must hold {list(PARTS)}, got {found}.")
        for part, value in parts.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{source}: `{key}.{part}` must be a tensor, got {type(value).__name__}.")
            tensors[layer_name(name[1], part)] = value.detach()
    return tensors


def to_legacy(tensors: Mapping[str, torch.Tensor], num_layers: int) -> dict[str, StateDict]:
    """The legacy dictionary of an eraser, for the code that wants one in each of `num_layers` blocks.

    A block without an eraser gets zeros: `up(gelu(down(x))) = 0` then.
    """
    shape = eraser_shape(tensors)
    tree = {}
    for index in range(num_layers):
        source = f"transformer_blocks.{index if index in shape.blocks else shape.blocks[0]}.attn1"
        tree[f"transformer_blocks.{index}.attn1.{LEGACY_TYPE}"] = {
            part: tensors[layer_name(source, part)].detach().cpu() * (index in shape.blocks) for part in PARTS
        }
    return tree


def eraser_shape(tensors: Mapping[str, torch.Tensor], source: str = "`tensors`") -> EraserShape:
    """Width, rank and blocks of an eraser, after a check that its tensors belong together.

    Raises:
        ValueError: no tensors, a strange or missing key, a wrong shape, values that are not finite. It begins with
            `source`.
    """
    known = families_of("eraser")
    pattern = re.compile(
        _KEY.format(
            blocks="|".join(re.escape(family.blocks) for family in known),
            attentions="|".join(re.escape(family.joint_attention) for family in known),
        )
    )
    blocks: dict[int, str] = {}
    for name, value in tensors.items():
        key = pattern.fullmatch(name)
        if key is None:
            raise ValueError(f"{source} must hold the erasers of a CogVideoX, got `{name}`.")
        if value.dtype not in FLOATING or value.layout != torch.strided:
            raise ValueError(
                f"{source}: `{name}` must be a dense tensor of float16, bfloat16, float32 or "
                f"float64, got {value.dtype} ({value.layout})."
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{source}: `{name}` must be finite, got values that are not.")
        blocks[int(key[2])] = key[1]
    if not blocks:
        raise ValueError(f"{source} must hold the erasers of a CogVideoX, got no tensors.")
    first = layer_name(next(iter(blocks.values())), "down.weight")
    if first not in tensors or tensors[first].ndim != 2:
        raise ValueError(f"{source} must hold the matrix `{first}`, got none.")
    rank, width = tensors[first].shape
    shapes = dict(zip(PARTS, ((rank, width), (rank,), (width, rank), (width,))))
    for attention in blocks.values():
        for part, expected in shapes.items():
            name = layer_name(attention, part)
            found = tuple(tensors[name].shape) if name in tensors else "none"
            if found != expected:
                raise ValueError(f"{source}: `{name}` must be {expected}, got {found}.")
    return EraserShape(width, rank, tuple(sorted(blocks)))


def check_fit(shape: EraserShape, width: int, num_layers: int, made_for: int | None) -> None:
    """Raise `ValueError` unless an eraser is for a transformer of this size; it names both sizes.

    `made_for` is the number of blocks it was made for, `None` where its file does not say.
    """
    blocks = shape.blocks[-1] + 1 if made_for is None else made_for
    right_blocks = blocks <= num_layers if made_for is None else blocks == num_layers
    if shape.width != width or not right_blocks:
        raise ValueError(
            f"The eraser must fit the transformer, of width {width} with {num_layers} blocks, got "
            f"one for width {shape.width} with {blocks} blocks. Load it into the model it was "
            "trained on (CogVideoX-2b: 1920 and 30; the 5b models: 3072 and 42)."
        )
