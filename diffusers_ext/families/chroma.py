"""Chroma: FLUX.1's blocks without pooled text and guidance input, with T5's tokens under a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from diffusers_ext.families.flux import PackedLatents
from diffusers_ext.families.text_conditioning import TextConditioning

if TYPE_CHECKING:
    from diffusers import ChromaPipeline


class Chroma(PackedLatents):
    """Chroma1, base and HD; the mask keeps T5's tokens and one of its padding."""

    name = "chroma"
    title = "Chroma"
    pipelines = ("ChromaPipeline",)
    denoiser_class = "ChromaTransformer2DModel"
    tools = frozenset({"nullspace"})
    nullspace_pipeline = "NullSpaceDreamBoothChromaPipeline"
    t5_tokens = 512
    checkpointing_fault = "leaves the mask of the text out of single blocks"
    text_fields = ("prompt_embeds", "attention_mask")

    def encode(self, pipeline: ChromaPipeline, prompts: list[str], negatives: list[str] | None) -> TextConditioning:
        embeds, _, mask, negative, _, negative_mask = pipeline.encode_prompt(prompt=prompts, negative_prompt=negatives)
        return TextConditioning(embeds, negative, mask, negative_mask)

    def predict(
        self,
        pipeline: ChromaPipeline,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: TextConditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        batch, _, height, width = latents.shape
        packed = self.pack(pipeline, latents)
        mask = pipeline._prepare_attention_mask(batch, packed.shape[1], packed.dtype, text.attention_mask)
        prediction = pipeline.transformer(
            hidden_states=packed,
            timestep=timestep.expand(batch).to(latents.dtype) / 1000,
            encoder_hidden_states=text.prompt_embeds,
            txt_ids=torch.zeros(text.prompt_embeds.shape[1], 3).to(latents),
            img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, latents.dtype),
            attention_mask=mask.to(latents.dtype),
            return_dict=False,
        )[0]
        return self.unpack_like(pipeline, prediction, latents)
