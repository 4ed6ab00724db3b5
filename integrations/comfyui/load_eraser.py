"""Node *Load Eraser*: takes one concept out of a model, by an eraser of diffusers_ext.

What can work depends on the eraser. One of kind "linear" is a LoRA, which ComfyUI's own loader puts into a model that
it knows the names of. One of kind "gelu" is no change of weights: it needs a transformer of diffusers, as nodes that
wrap diffusers have it; ComfyUI's own models have other modules and other streams of tokens, and are refused.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from safetensors.torch import load_file

from diffusers_ext import load_eraser
from diffusers_ext.eraser.adapter.outputs import eraser_layers
from diffusers_ext.eraser.linear import convert_eraser_to_lora
from diffusers_ext.families import match_family
from diffusers_ext.families.lora_files import COMFYUI_NAME, KOHYA_NAME, StateDict

from .debleed_lora import add_lora


def transformer_of(model: Any) -> torch.nn.Module | None:
    """The transformer of diffusers in what a wrapper's node gives; `None` for a model of ComfyUI's own."""
    inner = getattr(model, "model", None)
    holders = (model, inner, getattr(model, "pipe", None))
    found = [getattr(holder, name, None) for holder in holders for name in ("transformer", "unet", "diffusion_model")]
    if isinstance(model, dict):
        found += [model.get("transformer"), model.get("pipe") and getattr(model["pipe"], "transformer", None)]
    return next((one for one in (model, *found) if isinstance(one, torch.nn.Module) and match_family(one)), None)


def eraser_lora(eraser: str, scale: float) -> StateDict:
    """A linear eraser as a LoRA under the names that ComfyUI reads.

    Raises:
        ValueError: an eraser of kind "gelu", of two transformers, or of a family whose names ComfyUI does not read.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = convert_eraser_to_lora(eraser, folder, scale=scale)
        found = [path for path in written if path.name in (COMFYUI_NAME, KOHYA_NAME)]
        if len(found) != 1:
            raise ValueError(
                f"`eraser` must be one that becomes one LoRA for ComfyUI, got {len(found)} files for it. It reads no "
                "names of this family, or the eraser has parts for several transformers."
            )
        return load_file(found[0])


class LoadEraser:
    """The node: model in, model without the concept out."""

    CATEGORY = "loaders"
    DESCRIPTION = "Takes a concept out of a model: linear erasers of any, others of wrappers around diffusers."
    FUNCTION = "load"
    RETURN_TYPES = ("*",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[Any, ...]]]:  # noqa: N802
        """What ComfyUI shows and connects; a wrapper's models have types of their own."""
        return {
            "required": {
                "model": ("*",),
                "eraser": ("STRING", {"default": "user/no-dog", "tooltip": "Folder or Hub name."}),
                "scale": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 5.0, "step": 0.05}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict[str, str]) -> bool:  # noqa: N802
        """Take a connection of any type; what is no model is refused when it is loaded."""
        return True

    def load(self, model: Any, eraser: str, scale: float) -> tuple[Any]:
        """The node's function; on a transformer of diffusers the eraser stays, under its name, at the last scale."""
        transformer = transformer_of(model)
        if transformer is not None:
            attach(transformer, eraser, scale)
            return (model,)
        if not hasattr(model, "add_patches"):
            raise TypeError(f"`model` must be a MODEL, or a wrapper around diffusers, got a {type(model).__name__}.")
        return (add_lora(model, eraser_lora(eraser, scale), 1.0),)


def attach(transformer: torch.nn.Module, eraser: str, scale: float) -> None:
    """Load an eraser onto a transformer, or set the scale of one that is there."""
    name = "".join(c if c.isalnum() or c == "_" else "_" for c in eraser)
    layers = [layer for layer in eraser_layers(transformer).values() if name in layer.scaling]
    if not layers:
        load_eraser(transformer, eraser, adapter_name=name, scale=scale)
    for layer in layers:
        layer.set_scale(name, scale)
