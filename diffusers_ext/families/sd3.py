"""Stable Diffusion 3 and 3.5: flow matching with joint attention of picture and text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.families.family import TextConditioning
from diffusers_ext.families.picture_velocity import PictureFamily
from diffusers_ext.families.published import CLIP_BIG_G, CLIP_L_PROJECTION, T5_XXL, VAE_16, Component, Published

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline


def _sd3(num_heads: int, num_layers: int, **more: Any) -> dict[str, Component]:
    transformer = {
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "attention_head_dim": 64,
        "caption_projection_dim": 64 * num_heads,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        **more,
    }
    encoders = {"text_encoder": CLIP_L_PROJECTION, "text_encoder_2": CLIP_BIG_G, "text_encoder_3": T5_XXL}
    return {"transformer": ("SD3Transformer2DModel", transformer), "vae": VAE_16, **encoders}


# Of 3.5.
_NORMED = {"qk_norm": "rms_norm"}
_MEDIUM = {**_NORMED, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}


class SD3(PictureFamily):
    """Stable Diffusion 3; its text is CLIP's tokens, then T5's."""

    name = "sd3"
    title = "SD3"
    pipelines = ("StableDiffusion3Pipeline",)
    modular_blocks = ("StableDiffusion3AutoBlocks",)
    tools = frozenset({"nullspace", "golden_noise", "eraser"})
    golden_pipeline = "GoldenNoiseSD3Pipeline"
    nullspace_pipeline = "NullSpaceDreamBoothSD3Pipeline"
    denoiser_class = "SD3Transformer2DModel"
    flow_matching = True
    token_encoders = ("text_encoder", "text_encoder_3")  # CLIP's tokens come before T5's
    reads_hidden_states = True
    text_fields = ("prompt_embeds", "pooled_prompt_embeds")
    text_outputs = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}
    # The last block drops the text.
    joint_attention, joint_blocks, video_alone = "attn", ("JointTransformerBlock",), True
    published = (
        Published("stabilityai/stable-diffusion-3-medium-diffusers", "SD3", _sd3(24, 24), torch.float16),
        Published("stabilityai/stable-diffusion-3.5-medium", "SD3.5-medium", _sd3(24, 24, **_MEDIUM), torch.bfloat16),
        Published("stabilityai/stable-diffusion-3.5-large", "SD3.5-large", _sd3(38, 38, **_NORMED), torch.bfloat16),
    )

    def encode(
        self, pipeline: StableDiffusion3Pipeline, prompts: list[str], negatives: list[str] | None
    ) -> TextConditioning:
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, negative_prompt=negatives
        )
        return TextConditioning(
            embeds, negative, pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=negative_pooled
        )

    def text_length(self, config: Any) -> int:
        """CLIP's tokens, then T5's."""
        return 77 + self.t5_tokens

    def text_width(self, config: Any) -> int:
        return config.joint_attention_dim

    def pooled_width(self, config: Any) -> int:
        return config.pooled_projection_dim

    def longest_side(self, config: Any) -> int:
        return config.pos_embed_max_size

    def predict(
        self,
        pipeline: StableDiffusion3Pipeline,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: TextConditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        return pipeline.transformer(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=text.prompt_embeds,
            pooled_projections=text.pooled_prompt_embeds,
            return_dict=False,
        )[0]
