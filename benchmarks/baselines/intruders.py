"""PEFT's `reduce_intruder_dimension` (arXiv 2410.21228) on a LoRA: forget less after training, without any data.

Singular directions of `W + D` that no singular direction of W resembles are shrunk to the share `mitigation` of
themselves, and what is left of D is cut to its rank again.
"""

from __future__ import annotations

import copy

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension

from diffusers_ext.families.lora_files import LoraSource, read_lora

_REDUCED = "intruder_reduced"


def reduce_intruders(
    pipeline: StableDiffusionPipeline, lora: LoraSource, mitigation: float, *, top_k: int = 10, threshold: float = 0.5
) -> dict[str, torch.Tensor]:
    """The LoRA with its intruders shrunk, keys as in `read_lora`; the pipeline is left as it was.

    Args:
        lora: of one rank, on Linears of the UNet.
        mitigation, top_k, threshold: PEFT's `mitigation_lambda`, `top_k` and `threshold_epsilon`, and its defaults.
    """
    weights = read_lora(lora)
    names = [key.removeprefix("unet.").removesuffix(".lora_A.weight") for key in weights if ".lora_A." in key]
    rank = len(weights[f"unet.{names[0]}.lora_A.weight"])
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    model = get_peft_model(copy.deepcopy(pipeline.unet), config)
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in names}
    for name, layer in layers.items():
        for part, weight in (("A", layer.lora_A["default"].weight), ("B", layer.lora_B["default"].weight)):
            weight.data = weights[f"unet.{name}.lora_{part}.weight"].to(weight)
    reduce_intruder_dimension(
        model, "default", _REDUCED, top_k=top_k, threshold_epsilon=threshold, mitigation_lambda=mitigation,
        logging_sink=None,
    )  # fmt: skip
    reduced = {}
    for name, layer in layers.items():
        reduced[f"unet.{name}.lora_A.weight"] = layer.lora_A[_REDUCED].weight.data.contiguous()
        reduced[f"unet.{name}.lora_B.weight"] = layer.lora_B[_REDUCED].weight.data.contiguous()
    return reduced
