"""Stable Diffusion 1 and 2: a UNet with cross-attention to the tokens of one CLIP encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.families.picture_velocity import PictureFamily
from diffusers_ext.families.published import CLIP_L, OPEN_CLIP_H, SAFETY_CHECKER, VAE, Component, Published
from diffusers_ext.families.text_conditioning import TextConditioning, refuse_negative_prompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


_SD2_UNET = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}


def _stable_diffusion_2(sample_size: int) -> dict[str, Component]:
    unet = ("UNet2DConditionModel", {**_SD2_UNET, "sample_size": sample_size})
    return {"vae": VAE, "text_encoder": OPEN_CLIP_H, "unet": unet}


class StableDiffusion(PictureFamily):
    """Stable Diffusion 1 and 2, also distilled with the guidance scale as an input (LCM)."""

    name = "sd"
    title = "Stable Diffusion"
    pipelines = ("StableDiffusionPipeline",)
    tools = frozenset({"nullspace", "golden_noise"})
    golden_pipeline = "GoldenNoisePipeline"
    nullspace_pipeline = "NullSpaceDreamBoothPipeline"
    single_file_prefix = "cond_stage_model."
    lora_versions = {
        768: ("sd_v1", "stable-diffusion-v1/lora"),
        1024: ("sd_v2", None),  # 512 or 768-v, which only the scheduler tells
    }
    denoiser = "unet"
    denoiser_class = "UNet2DConditionModel"
    joint_attention, joint_blocks, video_alone = "attn2", ("BasicTransformerBlock",), True
    published = (
        Published(
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "SD1.5",
            {
                "vae": VAE,
                "text_encoder": CLIP_L,
                "safety_checker": SAFETY_CHECKER,
                "unet": (
                    "UNet2DConditionModel",
                    {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
                ),
            },
            torch.float32,
        ),
        Published("stabilityai/stable-diffusion-2-1", "SD2.1", _stable_diffusion_2(96), torch.float32),
        Published("stabilityai/stable-diffusion-2-1-base", "SD2.1-base", _stable_diffusion_2(64), torch.float32),
    )

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str], negatives: list[str] | None) -> TextConditioning:
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

    def attention_width(self, config: Any) -> int:
        """Of the first layer with cross-attention."""
        layers = zip(config["block_out_channels"], config["down_block_types"], strict=True)
        return min(width for width, kind in layers if "CrossAttn" in kind)

    def text_length(self, config: Any) -> int:
        """Of CLIP."""
        return 77

    def text_width(self, config: Any) -> int:
        width = config.encoder_hid_dim or config.cross_attention_dim
        return width[0] if isinstance(width, (list, tuple)) else width

    def embedded_guidance(self, config: Any) -> bool:
        return config.time_cond_proj_dim is not None

    def predict(
        self,
        pipeline: DiffusionPipeline,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: TextConditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
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
