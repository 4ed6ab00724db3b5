"""Pipelines of all image families that start from noise which suits the prompt."""

from __future__ import annotations

from diffusers import (
    FluxPipeline,
    HunyuanDiTPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from diffusers_ext.golden_noise.pipeline_mixin import GoldenNoiseMixin


class GoldenNoisePipeline(GoldenNoiseMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""


class GoldenNoiseXLPipeline(GoldenNoiseMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""


class GoldenNoiseHunyuanDiTPipeline(GoldenNoiseMixin, HunyuanDiTPipeline):
    """`HunyuanDiTPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`.

    The network reads the first encoder's (BERT) text with its mask.
    """


class GoldenNoiseSD3Pipeline(GoldenNoiseMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""


class GoldenNoiseFluxPipeline(GoldenNoiseMixin, FluxPipeline):
    """`FluxPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`.

    The network reads the T5 text and sees the latents unpacked.
    """
