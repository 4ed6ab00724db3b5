"""A tiny Stable Diffusion pipeline as one file with the names of its original layout."""

from __future__ import annotations

import os
import re

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(pipeline: StableDiffusionPipeline, path: str | os.PathLike) -> None:
    """Write a pipeline whose blocks all have as many layers as Stable Diffusion's, or one each."""
    save_file(original_layout(pipeline), path)


def original_layout(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """UNet, VAE and text encoder by the names of the checkpoints of Stable Diffusion 1."""
    layers = pipeline.unet.config.layers_per_block
    found = {
        f"model.diffusion_model.{_unet_name(name, layers)}": tensor
        for name, tensor in pipeline.unet.state_dict().items()
    }
    last = len(pipeline.vae.config.up_block_types) - 1
    for name, tensor in pipeline.vae.state_dict().items():
        linear = "attentions" in name and name.endswith("weight") and tensor.ndim == 2
        found[f"first_stage_model.{_vae_name(name, last)}"] = tensor[:, :, None, None] if linear else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        name = name.removeprefix("text_model.")
        found[f"cond_stage_model.transformer.text_model.{name}"] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _unet_name(name: str, layers: int) -> str:
    module, _, kind = name.rpartition(".")
    if module in _UNET:
        return f"{_UNET[module]}.{kind}"
    block = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if block is None:  # mid_block.<part>.<index>.<rest>
        _, part, index, rest = name.split(".", 3)
        place = 1 if part == "attentions" else 2 * int(index)
        return f"middle_block.{place}.{_resnet_name(rest) if part == 'resnets' else rest}"
    side, number, part, index, rest = block.groups()
    place = int(number) * (layers + 1) + int(index)
    if side == "down":
        if part == "downsamplers":
            return f"input_blocks.{(int(number) + 1) * (layers + 1)}.0.op.{kind}"
        prefix = f"input_blocks.{place + 1}"
    elif part == "upsamplers":
        return f"output_blocks.{int(number) * (layers + 1) + layers}.2.conv.{kind}"
    else:
        prefix = f"output_blocks.{place}"
    return f"{prefix}.0.{_resnet_name(rest)}" if part == "resnets" else f"{prefix}.1.{rest}"


def _resnet_name(rest: str) -> str:
    module, _, kind = rest.rpartition(".")
    return f"{_RESNET[module]}.{kind}"


def _vae_name(name: str, last: int) -> str:
    name = name.replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for new, old in _ATTENTION.items():
            name = name.replace(f".{new}.", f".{old}.")
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    up = lambda part: lambda m: f"up.{last - int(m[1])}.{part}"
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", up("block."), name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", up("upsample"), name)
    return name.replace("conv_shortcut", "nin_shortcut")
