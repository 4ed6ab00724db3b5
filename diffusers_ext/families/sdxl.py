"""Stable Diffusion XL: a UNet that also reads pooled text and the picture's size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.families.stable_diffusion import StableDiffusion
from diffusers_ext.families.text_conditioning import TextConditioning


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class SDXL(StableDiffusion):
    """Stable Diffusion XL."""

    name = "sdxl"
    title = "SDXL"
    pipelines = ("StableDiffusionXLPipeline",)
    golden_pipeline = "GoldenNoiseXLPipeline"
    nullspace_pipeline = "NullSpaceDreamBoothXLPipeline"
    text_fields = ("prompt_embeds", "pooled_prompt_embeds")
    text_outputs = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}

    def pooled_width(self, config: Any) -> int:
        """See `Family`."""
        # The UNet adds the pooled text to the embeddings of six numbers: sizes and crop.
        return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def size_conditions(
        self, pipeline: DiffusionPipeline, latents: torch.Tensor, text: TextConditioning
    ) -> dict[str, Any]:
        """Sizes are the picture's own, without a crop."""
        size = tuple(pipeline.vae_scale_factor * length for length in latents.shape[2:])
        ids = pipeline._get_add_time_ids(
            size, (0, 0), size, latents.dtype, text.pooled_prompt_embeds.shape[-1]
        )
        added = {
            "text_embeds": text.pooled_prompt_embeds,
            "time_ids": ids.to(latents.device).repeat(len(latents), 1),
        }
        return {"added_cond_kwargs": added}
