"""The tensors of an eraser: their names in the transformer, and what their shapes say about the model it is for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from diffusers_ext.core.tensor_files import FLOATING
from diffusers_ext.families import families_of, titles_of
from diffusers_ext.families.family import Family

# A UNet's blocks lie in its layers.
_KEY = (
    r"(((?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.)?(?:{blocks})\.(\d+)\.(?:{attentions}))"
    r"\.to_out\.1\.eraser_(?:down|up)\.(?:weight|bias)"
)
# Name in the legacy file -> module of the layer and its parameter.
PARTS = {
    "down.weight": ("eraser_down", "weight"),
    "down.bias": ("eraser_down", "bias"),
    "up.weight": ("eraser_up", "weight"),
    "up.bias": ("eraser_up", "bias"),
}
StateDict = dict[str, torch.Tensor]  # named as in the transformer


def parts_of(kind: str) -> tuple[str, ...]:
    """The keys of `PARTS` that an eraser of a kind has: a linear one has no biases."""
    return tuple(part for part in PARTS if kind == "gelu" or part.endswith("weight"))


class EraserShape(NamedTuple):
    """What the tensors of an eraser say about the model it is for."""

    width: int  # of the denoiser's tokens, the widest
    rank: int
    blocks: tuple[int, ...]  # numbers of the blocks that carry one, ascending; of a UNet, counted through


def layer_name(attention: str, part: str) -> str:
    """Name in the transformer of one tensor; `layer_name("transformer_blocks.0.attn1", "up.bias")`."""
    return f"{attention}.to_out.1.{'.'.join(PARTS[part])}"


def kind_of(tensors: Iterable[str]) -> str:
    """The kind of an eraser by the names of its tensors: a linear one has no biases."""
    return "gelu" if any(name.endswith(".bias") for name in tensors) else "linear"


def eraser_shape(tensors: Mapping[str, torch.Tensor], source: str = "`tensors`") -> EraserShape:
    """Width, rank and blocks of an eraser, or a `ValueError` where its tensors do not belong together."""
    known = families_of("eraser_adapter")
    pattern = re.compile(
        _KEY.format(
            blocks="|".join({re.escape(family.blocks): None for family in known}),
            attentions="|".join({re.escape(family.joint_attention): None for family in known}),
        )
    )
    attentions: dict[str, int | None] = {}
    for name, value in tensors.items():
        key = pattern.fullmatch(name)
        if key is None:
            raise ValueError(f"{source} must hold the erasers of a {titles_of('eraser_adapter')}, got `{name}`.")
        if value.dtype not in FLOATING or value.layout != torch.strided:
            raise ValueError(
                f"{source}: `{name}` must be a dense tensor of float16, bfloat16, float32 or "
                f"float64, got {value.dtype} ({value.layout})."
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{source}: `{name}` must be finite, got values that are not.")
        attentions[key[1]] = None if key[2] else int(key[3])
    if not attentions:
        raise ValueError(f"{source} must hold the erasers of a {titles_of('eraser_adapter')}, got no tensors.")
    return _checked_shape(tensors, attentions, source)


def _checked_shape(
    tensors: Mapping[str, torch.Tensor], attentions: Mapping[str, int | None], source: str
) -> EraserShape:
    kind, first, widths = kind_of(tensors), next(iter(attentions)), []
    for attention, block in attentions.items():
        # Widths differ by layer in a UNet alone; a linear one reads what its attention is wide inside.
        of = attention if block is None else first
        for part in ("down.weight", "up.weight"):
            matrix = layer_name(of, part)
            if matrix not in tensors or tensors[matrix].ndim != 2:
                raise ValueError(f"{source} must hold the matrix `{matrix}`, got none.")
        rank, inner = (
            tensors[layer_name(first, "down.weight")].shape[0],
            tensors[layer_name(of, "down.weight")].shape[1],
        )
        width = inner if kind == "gelu" else tensors[layer_name(of, "up.weight")].shape[0]
        widths.append(width)
        for part, expected in zip(PARTS, ((rank, inner), (rank,), (width, rank), (width,))):
            name = layer_name(attention, part)
            found = tuple(tensors[name].shape) if name in tensors else "none"
            if found != expected and (kind == "gelu" or part in parts_of("linear")):
                raise ValueError(f"{source}: `{name}` must be {expected}, got {found}.")
    numbers = [place if block is None else block for place, block in enumerate(attentions.values())]
    return EraserShape(max(widths), rank, tuple(sorted(numbers)))


def family_of_tensors(tensors: Iterable[str]) -> Family:
    """The first family, of those that erasers can be trained on before others, whose attentions have such names."""
    *outside, blocks, _, attention = next(iter(tensors)).split(".to_out.1.")[0].split(".")
    found = [f for f in families_of("eraser_adapter") if (f.blocks, f.joint_attention) == (blocks, attention)]
    return next((f for f in found if bool(outside) == (f.denoiser == "unet")), found[0])


def check_fit(shape: EraserShape, width: int, num_layers: int, made_for: int | None) -> None:
    """Raise `ValueError` unless an eraser, `made_for` so many blocks if known, is for a transformer of this size."""
    blocks = shape.blocks[-1] + 1 if made_for is None else made_for
    right_blocks = blocks <= num_layers if made_for is None else blocks == num_layers
    if shape.width != width or not right_blocks:
        raise ValueError(
            f"The eraser must fit the transformer, of width {width} with {num_layers} blocks, got "
            f"one for width {shape.width} with {blocks} blocks. Load it into the model it was "
            "trained on (CogVideoX-2b: 1920 and 30; the 5b models: 3072 and 42)."
        )
