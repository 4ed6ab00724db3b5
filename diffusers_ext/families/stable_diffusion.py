"""Stable Diffusion 1 and 2: a UNet with cross-attention to the tokens of one CLIP encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.families.family import Family, refuse_negative_prompts
from diffusers_ext.families.text_conditioning import TextConditioning


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class StableDiffusion(Family):
    """Stable Diffusion 1 and 2, also distilled with the guidance scale as an input (LCM)."""

    name = "sd"
    title = "Stable Diffusion"
    pipelines = ("StableDiffusionPipeline",)
    tools = frozenset({"nullspace", "golden_noise"})
    golden_pipeline = "GoldenNoisePipeline"
    nullspace_pipeline = "NullSpaceDreamBoothPipeline"
    denoiser = "unet"
    denoiser_class = "UNet2DConditionModel"

    def encode(
        self, pipeline: DiffusionPipeline, prompts: list[str], negatives: list[str] | None
    ) -> TextConditioning:
        """See `Family`."""
        guided = not self.embedded_guidance(pipeline.unet.config)
        if not guided:
            refuse_negative_prompts(negatives)
        embeds, negative, *pooled = pipeline.encode_prompt(
            prompt=prompts,
            device=pipeline._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negatives,
        )
        positive_pooled, negative_pooled = pooled or (None, None)
        return TextConditioning(
            embeds,
            negative if guided else None,
            pooled_prompt_embeds=positive_pooled,
            negative_pooled_prompt_embeds=negative_pooled if guided else None,
        )

    def text_width(self, config: Any) -> int:
        """See `Family`."""
        width = config.encoder_hid_dim or config.cross_attention_dim
        return width[0] if isinstance(width, (list, tuple)) else width

    def embedded_guidance(self, config: Any) -> bool:
        """See `Family`."""
        return config.time_cond_proj_dim is not None

    def predict(
        self,
        pipeline: DiffusionPipeline,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: TextConditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        """See `Family`."""
        height, width = (pipeline.vae_scale_factor * length for length in latents.shape[2:])
        pooled = text.pooled_prompt_embeds
        added = self.added_conditions(pipeline, pooled, height, width, latents.dtype)
        conditions: dict[str, Any] = {}
        if self.embedded_guidance(pipeline.unet.config):
            scales = torch.full((len(latents),), guidance_scale - 1.0)
            conditions["timestep_cond"] = pipeline.get_guidance_scale_embedding(
                scales, embedding_dim=pipeline.unet.config.time_cond_proj_dim
            ).to(latents)
        return pipeline.unet(
            latents,
            timestep,
            encoder_hidden_states=text.prompt_embeds,
            return_dict=False,
            **conditions,
            added_cond_kwargs=added or None,
        )[0]

    def reads_text_alone(self, denoiser: torch.nn.Module, layer: str, slot: str) -> bool:
        """K and V of cross-attention in UNets without image prompts."""
        plain = getattr(denoiser, "encoder_hid_proj", None) is None
        return plain and layer.endswith(self.text_attention) and slot in ("k", "v")
