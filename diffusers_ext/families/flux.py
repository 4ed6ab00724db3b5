"""FLUX.1: flow matching over packed latents, dev with the guidance scale as an input; the packing is also others'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.families.family import Family
from diffusers_ext.families.published import CLIP_L, T5_XXL, VAE_16, Component, Published
from diffusers_ext.families.text_conditioning import TextConditioning, refuse_negative_prompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, FluxPipeline


def _flux(guidance_embeds: bool) -> dict[str, Component]:
    transformer = ("FluxTransformer2DModel", {"guidance_embeds": guidance_embeds})
    encoders = {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL}
    return {"vae": VAE_16, **encoders, "transformer": transformer}


class PackedLatents(Family):
    """What FLUX.1, Chroma and Qwen-Image share: 2 x 2 latent pixels are one token of four times the channels."""

    flow_matching = True
    rounds_size = True
    own_levels = True

    def text_width(self, config: Any) -> int:
        return config.joint_attention_dim

    def latent_channels(self, config: Any) -> int:
        """Those of the config are packed."""
        return int(config.in_channels) // 4

    def patch(self, config: Any) -> int:
        """The packing's, not the config's."""
        return 2

    def sample_size(self, config: Any) -> int:
        """The config says nothing of it."""
        return 128

    def pack(self, pipeline: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
        return pipeline._pack_latents(latents, *latents.shape)

    def unpack(self, pipeline: DiffusionPipeline, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """A video VAE's have one frame."""
        unpacked = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
        return unpacked[:, :, 0] if self.video_vae else unpacked

    def unpack_like(self, pipeline: DiffusionPipeline, packed: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Of the size of `latents`, unpacked ones."""
        height, width = (pipeline.vae_scale_factor * side for side in latents.shape[-2:])
        return self.unpack(pipeline, packed, height, width)

    def guidance_input(self, config: Any, latents: torch.Tensor, guidance_scale: float) -> torch.Tensor | None:
        """The guidance scale of each sample, float32, for a model that takes it as an input."""
        if not self.embedded_guidance(config):
            return None
        return torch.full((len(latents),), guidance_scale, device=latents.device, dtype=torch.float32)


class Flux(PackedLatents):
    """FLUX.1 dev and schnell; 2 x 2 latent pixels are one token of four times the channels."""

    name = "flux"
    title = "Flux"
    pipelines = ("FluxPipeline",)
    modular_blocks = ("FluxAutoBlocks",)
    tools = frozenset({"nullspace", "golden_noise"})
    golden_pipeline = "GoldenNoiseFluxPipeline"
    nullspace_pipeline = "NullSpaceDreamBoothFluxPipeline"
    denoiser_class = "FluxTransformer2DModel"
    token_encoders = ("text_encoder_2",)
    t5_tokens = 512
    text_fields = ("prompt_embeds", "pooled_prompt_embeds")
    text_outputs = {"prompt_embeds": 0, "pooled_prompt_embeds": 1}
    joint_attention, joint_blocks = "attn", ("FluxTransformerBlock",)
    published = (
        Published("black-forest-labs/FLUX.1-dev", "FLUX.1-dev", _flux(True), torch.bfloat16),
        Published("black-forest-labs/FLUX.1-schnell", "FLUX.1-schnell", _flux(False), torch.bfloat16),
    )

    def encode(self, pipeline: FluxPipeline, prompts: list[str], negatives: list[str] | None) -> TextConditioning:
        embeds, pooled, _ = pipeline.encode_prompt(prompt=prompts)
        if self.embedded_guidance(pipeline.transformer.config):
            refuse_negative_prompts(negatives)
            return TextConditioning(embeds, pooled_prompt_embeds=pooled)
        negative, negative_pooled, _ = pipeline.encode_prompt(prompt=negatives or [""] * len(prompts))
        return TextConditioning(
            embeds, negative, pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=negative_pooled
        )

    def pooled_width(self, config: Any) -> int:
        return config.pooled_projection_dim

    def text_arguments(self, text: TextConditioning) -> dict[str, torch.Tensor]:
        """The pipeline's call takes no negative prompt beside its guidance input."""
        found = super().text_arguments(text)
        return {name: x for name, x in found.items() if not name.startswith("negative_")}

    def embedded_guidance(self, config: Any) -> bool:
        return bool(config.guidance_embeds)

    def predict(
        self,
        pipeline: FluxPipeline,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: TextConditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        batch, _, height, width = latents.shape
        prediction = pipeline.transformer(
            hidden_states=self.pack(pipeline, latents),
            timestep=timestep.expand(batch).to(latents.dtype) / 1000,
            guidance=self.guidance_input(pipeline.transformer.config, latents, guidance_scale),
            pooled_projections=text.pooled_prompt_embeds,
            encoder_hidden_states=text.prompt_embeds,
            txt_ids=torch.zeros(text.prompt_embeds.shape[1], 3).to(latents),
            img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, latents.dtype),
            return_dict=False,
        )[0]
        return self.unpack_like(pipeline, prediction, latents)
