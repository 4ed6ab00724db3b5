"""Node *Debleed LoRA*: a LoRA without what it does to prompts that it is not about, by a dial.

The LoRA's `A` is read as `A ((1 - dial) I + dial P)`, `P` the projection onto what the preserved prompts leave unused;
0 is the LoRA as it is. ComfyUI patches weights when a dial has moved, so nothing is trained and no file is written.
"""

from __future__ import annotations

from typing import Any

import torch

from diffusers_ext import FeatureStatistics, debleed_lora
from diffusers_ext.families.lora_files import LoraSource, StateDict, export_lora, read_lora


def dialled_lora(
    lora: LoraSource,
    statistics: FeatureStatistics,
    dial: float,
    *,
    damping: float = 1e-3,
    uncovered: str = "error",
    pipeline: str | None = None,
) -> StateDict:
    """A LoRA projected as far as `dial` says, under the names that ComfyUI reads.

    Args:
        lora: a file or folder; `pipeline` names the class of diffusers that loads it, for transformers.
        dial: from 0, the LoRA as it is, to 1, `debleed_lora`.
        damping: of `debleed_lora`; the smaller, the more is taken out.
        uncovered: `"error"` or `"keep"`, for modules without statistics.
    """
    if not 0 <= dial <= 1:
        raise ValueError(f"`dial` must be in [0, 1], got {dial}.")
    plain = read_lora(lora, pipeline)
    if dial:
        projected = debleed_lora(plain, statistics, damping=damping, uncovered=uncovered)
        plain = {name: torch.lerp(tensor, projected[name].to(tensor), dial) for name, tensor in plain.items()}
    return export_lora(plain, "comfyui", pipeline=pipeline)


def add_lora(model: Any, lora: StateDict, strength: float) -> Any:
    """A MODEL with a LoRA, by ComfyUI's own loader; `ValueError` where it patches nothing."""
    from comfy.sd import load_lora_for_models

    patched, _ = load_lora_for_models(model, None, lora, strength, 0)
    # `{weight: list of patches}`; each module of the LoRA that ComfyUI knows adds one.
    before, after = (sum(map(len, one.patches.values())) for one in (model, patched))
    if after == before:
        raise ValueError(
            f"The LoRA must change the model, got no effect. ComfyUI knows none of its keys, one is "
            f"{next(iter(lora))!r}."
        )
    return patched


class DebleedLora:
    """The node: model in, model with the LoRA out."""

    CATEGORY = "loaders"
    DESCRIPTION = "Loads a LoRA without what it does to prompts that it is not about; the dial says how much is taken."
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[Any, ...]]]:  # noqa: N802
        """What ComfyUI shows and connects."""
        return {
            "required": {
                "model": ("MODEL",),
                "lora": ("STRING", {"default": "lora.safetensors", "tooltip": "File or folder of the LoRA."}),
                "statistics": ("STRING", {"default": "user/statistics", "tooltip": "Folder or Hub name."}),
                "strength": ("FLOAT", {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01}),
                "dial": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
                "damping": ("FLOAT", {"default": 0.001, "min": 0.0, "max": 1.0, "step": 0.0001, "round": False}),
                "uncovered": (["error", "keep"],),
            },
            "optional": {"pipeline": ("STRING", {"default": "", "tooltip": "Of a transformer, such as WanPipeline."})},
        }

    def load(
        self,
        model: Any,
        lora: str,
        statistics: str,
        strength: float,
        dial: float,
        damping: float,
        uncovered: str,
        pipeline: str = "",
    ) -> tuple[Any]:
        """The node's function."""
        found = FeatureStatistics.from_pretrained(statistics)
        tensors = dialled_lora(lora, found, dial, damping=damping, uncovered=uncovered, pipeline=pipeline or None)
        return (add_lora(model, tensors, strength),)
