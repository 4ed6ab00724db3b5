"""A UNet on the meta device with what trains in it, and the statistics that it is trained under."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model

from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.nullspace.collect import shared_inputs, text_only
from diffusers_ext.nullspace.lora import lora_linears
from diffusers_ext.nullspace.slots import find_linears
from diffusers_ext.nullspace.statistics import TEXT, FeatureStatistics
from diffusers_ext.planning.base_model import BaseModel
from diffusers_ext.planning.nullspace_setting import NullSpaceSetting


class Covered(NamedTuple):
    """The Linears whose inputs are counted.

    Attributes:
        sources: `{dotted name: key of its matrix}`.
        widths: `{key: width}`.
        readers: `{key: dotted name}` of those that are read along denoising runs.
    """

    sources: dict[str, str]
    widths: dict[str, int]
    readers: dict[str, str]

    @property
    def bytes(self) -> int:
        """Of all matrices, in float64."""
        return 8 * sum(width**2 for width in self.widths.values())


def covered_linears(unet: torch.nn.Module, setting: NullSpaceSetting) -> Covered:
    """What statistics of a setting cover.

    Args:
        unet: without an adapter.
        setting: features and layers.
    """
    linears = find_linears(unet, setting.features, setting.layers)
    text = {name: TEXT for name in linears if text_only(unet, name)}
    shared = shared_inputs([name for name in linears if name not in text])
    sources = {name: text.get(name) or shared[name] for name in linears}
    widths = {key: linears[name].in_features for name, key in sources.items()}
    return Covered(sources, widths, {key: name for name, key in reversed(shared.items())})


def trained_unet(
    base: BaseModel, setting: NullSpaceSetting, dtype: torch.dtype
) -> tuple[torch.nn.Module, list[torch.nn.Parameter], Covered]:
    """The UNet as it trains, what trains in it, and what statistics cover.

    Args:
        base: Stable Diffusion or SDXL.
        setting: of the run.
        dtype: of the frozen weights.
    """
    unet = base.components["unet"].build(dtype)
    covered = covered_linears(unet, setting)
    if setting.full_finetune:
        trained = [unet.get_submodule(name).weight for name in covered.sources]
        for weight in trained:
            weight.data = weight.data.float()
            weight.requires_grad_(True)
    else:
        config = LoraConfig(
            r=setting.rank, lora_alpha=setting.rank, target_modules=list(covered.sources)
        )
        with torch.device("meta"):
            inject_adapter_in_model(config, unet, "default")
        trained = _lora_weights(unet, frozen_a=setting.directions in ("generalized", "null"))
    if setting.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.train(), trained, covered


def _lora_weights(unet: torch.nn.Module, frozen_a: bool) -> list[torch.nn.Parameter]:
    trained = []
    for _, layer in lora_linears(unet):
        a, b = (part["default"].float().weight for part in (layer.lora_A, layer.lora_B))
        a.requires_grad_(not frozen_a)
        b.requires_grad_(True)
        trained += [b] if frozen_a else [a, b]
    return trained


def lora_tensors(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the LoRA's file by their names there."""
    tensors = {}
    for name, layer in lora_linears(unet):
        tensors[f"unet.{name}.lora_A.weight"] = layer.lora_A["default"].weight
        tensors[f"unet.{name}.lora_B.weight"] = layer.lora_B["default"].weight
    return tensors


def empty_statistics(
    sources: Mapping[str, str], widths: Mapping[str, int], device: torch.device
) -> FeatureStatistics:
    """Statistics of one vector that is zero.

    Args:
        sources, widths: of `Covered`.
        device: where they are.
    """
    moments = {key: SecondMoment(width, device) for key, width in widths.items()}
    for moment in moments.values():
        moment.count = 1
    return FeatureStatistics(moments, dict(sources), {})
