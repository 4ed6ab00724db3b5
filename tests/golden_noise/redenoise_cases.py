"""The five families as tiny pipelines, and what their own `__call__` predicts at its first step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.families import find_family
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_image_pipelines import tiny_flux_pipeline, tiny_hunyuan_dit_pipeline, tiny_sd3_pipeline
from tests.tiny_pipelines import sdxl_pipeline

PROMPTS = ["a red seven", "a blue two"]
BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": random_digits_pipeline,
    "sdxl": sdxl_pipeline,
    "hunyuan_dit": tiny_hunyuan_dit_pipeline,
    "hunyuan_dit_1_2": partial(tiny_hunyuan_dit_pipeline, image_conditions=False),
    "sd3": tiny_sd3_pipeline,
    "flux_dev": tiny_flux_pipeline,
    "flux_schnell": partial(tiny_flux_pipeline, guidance_embeds=False),
}


class FirstStep(NamedTuple):
    """What a pipeline hands to its scheduler at the first step; unpacked."""

    prediction: torch.Tensor
    timestep: float
    latents: torch.Tensor


def unit_noise(pipeline: DiffusionPipeline, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    """Two samples; size of the latents."""
    channels = pipeline.vae.config.latent_channels
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


class _Recorded(Exception):
    pass


def pipeline_first_step(
    pipeline: DiffusionPipeline,
    noise: torch.Tensor,
    guidance_scale: float,
    negative_prompt: str | None = None,
    num_steps: int = 10,
) -> FirstStep:
    """Run the pipeline's `__call__` on `PROMPTS` until its scheduler steps."""
    factor = pipeline.vae_scale_factor
    height, width = (factor * length for length in noise.shape[2:])
    family = find_family(pipeline).name
    flux = family == "flux"
    negatives = None if negative_prompt is None else [negative_prompt] * len(PROMPTS)
    arguments: dict[str, Any] = {"guidance_scale": guidance_scale, "negative_prompt": negatives}
    if flux and not pipeline.transformer.config.guidance_embeds:
        arguments = {"true_cfg_scale": guidance_scale, "negative_prompt": negatives or ["", ""]}
    if family == "hunyuan_dit":
        arguments["use_resolution_binning"] = False
    latents = pipeline._pack_latents(noise, *noise.shape) if flux else noise
    seen: list[FirstStep] = []

    def record(prediction, timestep, sample, **_):
        if flux:
            prediction, sample = (pipeline._unpack_latents(x, height, width, factor) for x in (prediction, sample))
        seen.append(FirstStep(prediction, float(timestep), sample))
        raise _Recorded

    step = pipeline.scheduler.step
    pipeline.scheduler.step = record
    try:
        pipeline(
            PROMPTS, height=height, width=width, latents=latents,
            num_inference_steps=num_steps, **arguments,
        )  # fmt: skip
    except _Recorded:
        pass
    finally:
        pipeline.scheduler.step = step
    return seen[0]
