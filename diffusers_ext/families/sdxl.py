"""Stable Diffusion XL: a UNet that also reads pooled text and the picture's size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.families.stable_diffusion import StableDiffusion


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class SDXL(StableDiffusion):
    """Stable Diffusion XL."""

    name = "sdxl"
    title = "SDXL"
    pipelines = ("StableDiffusionXLPipeline",)
    golden_pipeline = "GoldenNoiseXLPipeline"
    nullspace_pipeline = "NullSpaceDreamBoothXLPipeline"
    reads_hidden_states = True
    text_fields = ("prompt_embeds", "pooled_prompt_embeds")
    text_outputs = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}

    def pooled_width(self, config: Any) -> int:
        """See `Family`."""
        # The UNet adds the pooled text to the embeddings of six numbers: sizes and crop.
        return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def added_conditions(
        self,
        pipeline: DiffusionPipeline,
        pooled: torch.Tensor,
        height: int,
        width: int,
        dtype: torch.dtype,
    ) -> dict[str, torch.Tensor]:
        """See `Family`; sizes are the picture's own, without a crop."""
        size = (height, width)
        ids = pipeline._get_add_time_ids(size, (0, 0), size, dtype, pooled.shape[-1])
        return {
            "text_embeds": pooled,
            "time_ids": ids.to(pooled.device).repeat(len(pooled), 1),
        }
