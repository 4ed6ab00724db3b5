"""Sizes of CogVideoX clips: from frames and pixels to latents, from latents to video tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


# The pipelines refuse a height or width that is no multiple of this.
_PIPELINE_MULTIPLE = 8


class TokenGrid(NamedTuple):
    """How many video tokens lie along each axis; tokens run frame by frame, row by row."""

    frames: int
    rows: int
    columns: int


def latent_shape(
    transformer: torch.nn.Module, vae: torch.nn.Module, num_frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """`(frames, channels, height, width)` of the latents that a CogVideoX pipeline denoises for a clip.

    The VAE turns `2 r k + 1` frames, `r` its temporal compression, into `2 k + 1` latent frames
    and back; at any other number its decoder returns another number of frames than asked for.
    CogVideoX 1.5 puts `patch_size_t` latent frames in a token, so latent frames are added until
    they divide; the pipeline drops them, the first ones, before decoding.

    Args:
        transformer, vae: with the configs of CogVideoX.
        height, width: pixels.

    Raises:
        ValueError: a number of frames or a size that the model cannot take; names the nearest.
    """
    config = transformer.config
    period = 2 * vae.config.temporal_compression_ratio
    if num_frames < 1 or num_frames % period != 1:
        nearest = max(round((num_frames - 1) / period), 0) * period + 1
        raise ValueError(
            f"`num_frames` must be a multiple of {period} plus 1 for this VAE, got {num_frames}. "
            f"The nearest is {nearest}."
        )
    spatial = 2 ** (len(vae.config.block_out_channels) - 1)
    multiple = math.lcm(_PIPELINE_MULTIPLE, spatial * config.patch_size)
    for name, pixels in (("height", height), ("width", width)):
        if pixels < 1 or pixels % multiple:
            nearest = max(round(pixels / multiple), 1) * multiple
            raise ValueError(
                f"`{name}` must be a positive multiple of {multiple} for this model, got {pixels}. "
                f"The nearest is {nearest}."
            )
    latent_size = (height // spatial, width // spatial)
    _check_positions(config, latent_size, spatial)
    frames = (num_frames - 1) // vae.config.temporal_compression_ratio + 1
    patch_t = config.patch_size_t or 1
    return (math.ceil(frames / patch_t) * patch_t, config.out_channels, *latent_size)


def token_grid(transformer: torch.nn.Module, latent_shape: Sequence[int]) -> TokenGrid:
    """The grid of video tokens that the transformer makes of latents.

    `latent_shape` is `(frames, channels, height, width)`, with or without a batch before.

    Raises:
        ValueError: latents that patches do not tile.
    """
    shape = tuple(latent_shape)
    if len(shape) not in (4, 5):
        raise ValueError(
            "`latent_shape` must be (frames, channels, height, width), with or without a batch "
            f"before, got {shape}."
        )
    frames, _, height, width = shape[-4:]
    patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t or 1
    if frames % patch_t or height % patch or width % patch:
        raise ValueError(
            f"`latent_shape` must have frames divisible by {patch_t} and a height and width "
            f"divisible by {patch} for this model, got {shape}. `latent_shape()` pads frames."
        )
    return TokenGrid(frames // patch_t, height // patch, width // patch)


def _check_positions(config: dict[str, object], latent_size: tuple[int, int], spatial: int) -> None:
    """Refuse sizes for which the model has no positions."""
    largest = (config["sample_height"], config["sample_width"])
    pixels = tuple(side * spatial for side in largest)
    found = tuple(side * spatial for side in latent_size)
    if config["use_learned_positional_embeddings"] and latent_size != largest:
        raise ValueError(
            f"`height` and `width` must be {pixels[0]} and {pixels[1]} for a model with learned "
            f"positions, got {found[0]} and {found[1]}."
        )
    sliced = config["use_rotary_positional_embeddings"] and config["patch_size_t"] is not None
    if sliced and any(side > most for side, most in zip(latent_size, largest)):
        raise ValueError(
            f"`height` and `width` must be at most {pixels[0]} and {pixels[1]} for this model's "
            f"positions, got {found[0]} and {found[1]}."
        )
