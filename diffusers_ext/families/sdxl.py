"""Stable Diffusion XL: a UNet that also reads pooled text and the picture's size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.families.published import CLIP_BIG_G, CLIP_L, SDXL_VAE, Published
from diffusers_ext.families.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


_SDXL_UNET = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


class SDXL(StableDiffusion):
    """Stable Diffusion XL."""

    name = "sdxl"
    title = "SDXL"
    pipelines = ("StableDiffusionXLPipeline",)
    modular_blocks = ("StableDiffusionXLAutoBlocks",)
    tools = frozenset({"nullspace", "golden_noise", "eraser"})
    golden_pipeline = "GoldenNoiseXLPipeline"
    nullspace_pipeline = "NullSpaceDreamBoothXLPipeline"
    reads_hidden_states = True
    single_file_prefix = "conditioner.embedders."
    lora_versions = {2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora")}
    text_fields = ("prompt_embeds", "pooled_prompt_embeds")
    text_outputs = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}
    published = (
        Published(
            "stabilityai/stable-diffusion-xl-base-1.0",
            "SDXL",
            {
                "vae": SDXL_VAE,
                "text_encoder": CLIP_L,
                "text_encoder_2": CLIP_BIG_G,
                "unet": ("UNet2DConditionModel", _SDXL_UNET),
            },
            torch.float32,
        ),
    )

    def pooled_width(self, config: Any) -> int:
        # The UNet adds the pooled text to the embeddings of six numbers: sizes and crop.
        return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def modular_text(self, state: Any) -> dict[str, torch.Tensor | None]:
        text = super().modular_text(state)
        rows = text["pooled_prompt_embeds"].unflatten(0, (state.get("batch_size"), -1))
        if not rows.equal(rows[:, :1].expand_as(rows)):
            # diffusers 0.42 repeats pooled text in another order than tokens, prompts within pictures.
            rows = rows.reshape(rows.shape[1], rows.shape[0], -1).transpose(0, 1)
        return {**text, "pooled_prompt_embeds": rows.flatten(0, 1)}

    def added_conditions(
        self, pipeline: DiffusionPipeline, pooled: torch.Tensor, height: int, width: int, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Sizes are the picture's own, without a crop."""
        size = (height, width)
        ids = pipeline._get_add_time_ids(size, (0, 0), size, dtype, pooled.shape[-1])
        return {"text_embeds": pooled, "time_ids": ids.to(pooled.device).repeat(len(pooled), 1)}
