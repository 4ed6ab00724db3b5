"""A made-up family in one file: a picture model with joint attention for all three tools."""

from __future__ import annotations

import math

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention import JointTransformerBlock

from diffusers_ext.families.family import Family, TextConditioning, TokenGrid, Velocity
from tests.tiny_image_pipelines import tiny_sd3_pipeline


class MadeUpTransformer(SD3Transformer2DModel):
    """The denoiser."""


class MadeUpPipeline(StableDiffusion3Pipeline):
    """The pipeline."""


class MadeUpVelocity(Velocity):
    """Pictures as clips of one frame, with pooled text of zeros."""

    def token_grid(self, latent_shape):
        return MadeUp().token_grid(self.config, latent_shape)

    def __call__(self, x_t, t, prompt_embeds):
        pooled = x_t.new_zeros(len(x_t), self.config["pooled_projection_dim"])
        found = self.transformer(
            hidden_states=x_t[:, 0],
            timestep=t,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return found[:, None]


class MadeUp(Family):
    """All that the tools must know of it."""

    name = "made_up"
    title = "Made-up"
    pipelines = ("tests.families.made_up_family:MadeUpPipeline",)
    tools = frozenset({"nullspace", "golden_noise", "eraser"})
    denoiser_class = "tests.families.made_up_family:MadeUpTransformer"
    flow_matching = True
    text_fields = ("prompt_embeds", "pooled_prompt_embeds")
    text_attention = joint_attention = "attn"
    features = {name: ("attn", name, f"to_{name}") for name in ("q", "k", "v")}

    def encode(self, pipeline, prompts, negatives):
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, negative_prompt=negatives
        )
        return TextConditioning(
            embeds, negative, pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=negative_pooled
        )

    def text_width(self, config):
        return config.joint_attention_dim

    def pooled_width(self, config):
        return config.pooled_projection_dim

    def predict(self, pipeline, latents, timestep, text, guidance_scale):
        return pipeline.transformer(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=text.prompt_embeds,
            pooled_projections=text.pooled_prompt_embeds,
            return_dict=False,
        )[0]

    def is_joint_attention(self, attention, block):
        return isinstance(block, JointTransformerBlock)

    def latent_shape(self, config, vae_config, num_frames, height, width):
        scale = 2 ** (len(vae_config.block_out_channels) - 1)
        return num_frames, config.in_channels, height // scale, width // scale

    def token_grid(self, config, latent_shape):
        frames, _, height, width = latent_shape[-4:]
        return TokenGrid(frames, height // config.patch_size, width // config.patch_size)

    def velocity(self, pipeline, num_frames, height, width, **conditions):
        return MadeUpVelocity(pipeline.transformer)


def made_up_pipeline(seed: int = 0) -> MadeUpPipeline:
    """Of random weights."""
    parts = tiny_sd3_pipeline(seed).components
    transformer = MadeUpTransformer.from_config(parts["transformer"].config)
    transformer.load_state_dict(parts["transformer"].state_dict())
    pipeline = MadeUpPipeline(**{**parts, "transformer": transformer.eval()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clip_of_noise(pipeline: MadeUpPipeline, rows: int) -> torch.Tensor:
    """`(rows, 1, channels, height, width)` for 32 x 32 pixels."""
    shape = MadeUp().latent_shape(pipeline.transformer.config, pipeline.vae.config, 1, 32, 32)
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows * math.prod(shape), generator=generator).view(rows, *shape)
