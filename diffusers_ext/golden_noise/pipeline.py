"""Stable Diffusion and SDXL pipelines that start from noise which suits the prompt."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from diffusers_ext.golden_noise.pipeline_mixin import GoldenNoiseMixin


class GoldenNoisePipeline(GoldenNoiseMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""


class GoldenNoiseXLPipeline(GoldenNoiseMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""
