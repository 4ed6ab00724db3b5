"""Wan: flow matching over clips, with cross-attention to UMT5's tokens; a picture is a clip of one frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.families.family import Family
from diffusers_ext.families.published import UMT5_XXL, Component, Published
from diffusers_ext.families.text_conditioning import TextConditioning

if TYPE_CHECKING:
    from diffusers import WanPipeline


def _wan(num_heads: int, num_layers: int, ffn_dim: int) -> dict[str, Component]:
    transformer = {"num_attention_heads": num_heads, "num_layers": num_layers, "ffn_dim": ffn_dim}
    return {
        "text_encoder": UMT5_XXL,
        "vae": ("AutoencoderKLWan", {}),
        "transformer": ("WanTransformer3DModel", transformer),
    }


class Wan(Family):
    """Wan 2.1, and the first of the two transformers of 2.2; here it draws and learns pictures."""

    name = "wan"
    title = "Wan"
    pipelines = ("WanPipeline",)
    denoiser_class = "WanTransformer3DModel"
    vae_class = "AutoencoderKLWan"
    video_vae = True
    tools = frozenset({"nullspace"})
    nullspace_pipeline = "NullSpaceDreamBoothWanPipeline"
    flow_matching = True
    # The names of Wan's authors.
    comfyui_names = {
        r"^transformer\.": "diffusion_model.",
        r"\.condition_embedder\.(text|time)_embedder\.linear_1$": r".\1_embedding.0",
        r"\.condition_embedder\.(text|time)_embedder\.linear_2$": r".\1_embedding.2",
        r"\.condition_embedder\.time_proj$": ".time_projection.1",
        r"\.condition_embedder\.image_embedder\.ff\.net\.0\.proj$": ".img_emb.proj.1",
        r"\.condition_embedder\.image_embedder\.ff\.net\.2$": ".img_emb.proj.3",
        r"^diffusion_model\.proj_out$": "diffusion_model.head.head",
        r"\.attn1\.": ".self_attn.",
        r"\.attn2\.": ".cross_attn.",
        r"\.to_(q|k|v)$": r".\1",
        r"\.add_(k|v)_proj$": r".\1_img",
        r"\.to_out\.0$": ".o",
        r"\.ffn\.net\.0\.proj$": ".ffn.0",
        r"\.ffn\.net\.2$": ".ffn.2",
    }
    t5_tokens = 512
    published = (
        Published("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-1.3B", _wan(12, 30, 8960), torch.bfloat16),
        Published("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan2.1-14B", _wan(40, 40, 13824), torch.bfloat16),
    )
    smallest_call = {"num_frames": 1}
    call_arguments = {"num_frames": 1}
    blocks = "blocks"
    joint_attention, joint_blocks, video_alone = "attn1", ("WanTransformerBlock",), True
    text_stream = ()
    attention_linears = ("to_q", "to_k", "to_v", "to_out.0")

    def encode(self, pipeline: WanPipeline, prompts: list[str], negatives: list[str] | None) -> TextConditioning:
        embeds, negative = pipeline.encode_prompt(
            prompt=prompts, negative_prompt=negatives or [""] * len(prompts), max_sequence_length=self.t5_tokens
        )
        return TextConditioning(embeds, negative)

    def token_ids(self, pipeline: WanPipeline, prompt: str) -> list[list[int]]:
        """Of the prompt as the pipeline cleans it."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return super().token_ids(pipeline, prompt_clean(prompt))

    def text_width(self, config: Any) -> int:
        return config.text_dim

    def patch(self, config: Any) -> int:
        return config.patch_size[-1]

    def sample_size(self, config: Any) -> tuple[int, int]:
        """The pipeline's 480 x 832 pixels."""
        return 60, 104

    def pixels_per_latent(self, pipeline: WanPipeline) -> int:
        return pipeline.vae_scale_factor_spatial

    def pack(self, pipeline: WanPipeline, latents: torch.Tensor) -> torch.Tensor:
        return latents.unsqueeze(2)

    def unpack(self, pipeline: WanPipeline, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return latents[:, :, 0]

    def predict(
        self,
        pipeline: WanPipeline,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: TextConditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        timestep = timestep.expand(len(latents))
        if pipeline.config.expand_timesteps:  # Wan 2.2 5B has one for every token
            tokens = latents[0, 0].numel() // self.patch(pipeline.transformer.config) ** 2
            timestep = timestep[:, None].expand(-1, tokens)
        prediction = pipeline.transformer(
            hidden_states=self.pack(pipeline, latents),
            timestep=timestep,
            encoder_hidden_states=text.prompt_embeds.to(latents.dtype),
            return_dict=False,
        )[0]
        return prediction[:, :, 0]

    def grid_arguments(self, config: Any, num_steps: int, image_tokens: int) -> dict[str, Any]:
        """The pipeline gives a number of steps alone."""
        return {}
