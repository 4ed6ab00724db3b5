"""Stable Diffusion and SDXL pipelines that start from noise which suits the prompt."""

from __future__ import annotations

from typing import ClassVar

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from diffusers_ext.golden_noise.pipeline_mixin import GoldenNoiseMixin, NetworkSizes


class GoldenNoisePipeline(GoldenNoiseMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""

    def _sizes(self) -> NetworkSizes | None:
        if self.unet is None:
            return None
        config = self.unet.config
        return NetworkSizes(config.in_channels, config.cross_attention_dim)


class GoldenNoiseXLPipeline(GoldenNoiseMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""

    _text_outputs: ClassVar[dict[str, int]] = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}

    def _sizes(self) -> NetworkSizes | None:
        if self.unet is None:
            return None
        config = self.unet.config
        # The UNet adds the pooled text to the embeddings of six numbers: sizes and crop.
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return NetworkSizes(config.in_channels, config.cross_attention_dim, pooled)
