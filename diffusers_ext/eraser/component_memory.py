"""Peak memory of the text encoder and the VAE of a CogVideoX pipeline, traced from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import T5Config, T5EncoderModel

from diffusers_ext.core.memory_trace import (
    MemoryTrace,
    fake_tensors,
    fill_with_fake_tensors,
    tensor_bytes,
)
from diffusers_ext.families.cogvideox import CogVideoX
from diffusers_ext.families.family import import_class


class ComponentMemory(NamedTuple):
    """Bytes of a frozen component; `activations` are the peak of one call beyond its weights."""

    weights: int
    activations: int


@torch.no_grad()
def text_encoder_memory(
    config: Mapping[str, Any], prompts: int, text: int, dtype: torch.dtype
) -> ComponentMemory:
    """Of encoding prompts.

    Args:
        config: of a `T5EncoderModel`.
        prompts: encoded at once.
        text: tokens of each.
        dtype: of the weights.
    """
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**config)).to(dtype).eval()
        # Its blocks run one after the other, so that two of them reach the peak of all.
        weights = tensor_bytes([*encoder.parameters(), *encoder.buffers()])
        del encoder.encoder.block[2:]
    with fake_tensors():
        fill_with_fake_tensors(encoder)
        known = [*encoder.parameters(), *encoder.buffers()]
        with MemoryTrace(known) as trace:
            encoder(torch.zeros(prompts, text, dtype=torch.long))
    return ComponentMemory(weights, trace.peak)


@torch.no_grad()
def vae_memory(
    config: Mapping[str, Any],
    num_frames: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    *,
    decodes: bool,
) -> ComponentMemory:
    """Of encoding or decoding one clip in one piece, as without tiling.

    Args:
        config: of an `AutoencoderKLCogVideoX`.
        num_frames: frames of the clip.
        height: pixels.
        width: pixels.
        dtype: of the weights.
        decodes: latents to clip; otherwise clip to latents.
    """
    with torch.device("meta"):
        vae = import_class(CogVideoX.vae_class).from_config(dict(config))
    torch.nn.Module.to(vae, dtype).eval()
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    frames = (num_frames - 1) // vae.config.temporal_compression_ratio + 1
    latents = (1, vae.config.latent_channels, frames, height // scale, width // scale)
    clip = (1, vae.config.in_channels, num_frames, height, width)
    with fake_tensors():
        fill_with_fake_tensors(vae)
        known = [*vae.parameters(), *vae.buffers()]
        with MemoryTrace(known) as trace:
            if decodes:
                vae.decode(torch.empty(latents, dtype=dtype))
            else:
                vae.encode(torch.empty(clip, dtype=dtype))
    return ComponentMemory(tensor_bytes(known), trace.peak)
