"""Pictures from a given unit noise, whatever form a pipeline's call takes it in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.evaluation.rendering import Sampling, Shot, draw
from diffusers_ext.families.registry import find_family
from diffusers_ext.golden_noise.denoiser import TOOL, denoiser_of
from diffusers_ext.golden_noise.pairs.dataset import source_noise


def latent_shape(
    pipeline: DiffusionPipeline, height: int | None = None, width: int | None = None
) -> tuple[int, int, int]:
    """`(channels, height, width)` of the noise of a picture of so many pixels, before any packing into tokens."""
    factor, family = pipeline.vae_scale_factor, find_family(pipeline, TOOL)
    config = denoiser_of(pipeline).config
    own = family.sample_size(config)
    sizes = (own, own) if isinstance(own, int) else tuple(own)
    rows, columns = (
        size if asked is None else asked // factor
        for size, asked in zip(sizes, (height, width), strict=True)
    )
    patch = family.patch(config) if family.rounds_size else 1
    return family.latent_channels(config), rows // patch * patch, columns // patch * patch


def unit_noise(shots: Sequence[Shot], shape: tuple[int, int, int]) -> torch.Tensor:
    """Noise `(n, channels, height, width)`, float32 on the CPU, each from its shot's seed alone."""
    return torch.stack([source_noise(shot.seed, shape) for shot in shots])


def draw_from_noise(
    pipeline: DiffusionPipeline, shots: Sequence[Shot], sampling: Sampling, noise: torch.Tensor
) -> torch.Tensor:
    """Pictures `(n, 3, height, width)` in [0, 1] from unit noise, which sets their size.

    Pipelines multiply `latents` by their scheduler's `init_noise_sigma` themselves.
    """
    family = find_family(pipeline, TOOL)
    latents = noise.to(pipeline._execution_device, denoiser_of(pipeline).dtype)
    height, width = (size * pipeline.vae_scale_factor for size in noise.shape[-2:])
    latents, sampling = (
        family.pack(pipeline, latents),
        replace(sampling, height=height, width=width),
    )
    return draw(pipeline, shots, sampling, latents, **family.call_arguments)


@contextmanager
def without_noise_model(pipeline: DiffusionPipeline) -> Iterator[None]:
    """A golden-noise pipeline as the plain one; its network comes back."""
    network = getattr(pipeline, "noise_model", None)
    if network is None:
        yield
        return
    try:
        # By assignment diffusers would forget the component's class for good.
        vars(pipeline)["noise_model"] = None
        yield
    finally:
        vars(pipeline)["noise_model"] = network
