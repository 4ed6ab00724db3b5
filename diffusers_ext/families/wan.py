"""Wan: flow matching over clips, with cross-attention to UMT5's tokens; a picture is a clip of one frame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.core.seeds import check_flow_levels
from diffusers_ext.families.family import Family, TokenGrid, Velocity
from diffusers_ext.families.published import UMT5_XXL, Component, Published
from diffusers_ext.families.text_conditioning import TextConditioning
from diffusers_ext.families.velocity import check_num_frames, check_pixels, check_times, check_tokens, latent_sides

if TYPE_CHECKING:
    from diffusers import WanPipeline


def _wan(
    num_heads: int, num_layers: int, ffn_dim: int, *, channels: int = 16, vae: Mapping[str, Any] | None = None
) -> dict[str, Component]:
    transformer = {"num_attention_heads": num_heads, "num_layers": num_layers, "ffn_dim": ffn_dim}
    transformer |= {"in_channels": channels, "out_channels": channels}
    return {
        "text_encoder": UMT5_XXL,
        "vae": ("AutoencoderKLWan", vae or {}),
        "transformer": ("WanTransformer3DModel", transformer),
    }


_TI2V_CHANNELS = 48
# But for the statistics of its latents.
_TI2V_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": _TI2V_CHANNELS,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * _TI2V_CHANNELS,
    "latents_std": [1.0] * _TI2V_CHANNELS,
}
_WAN_14B = _wan(40, 40, 13824)


# The pipeline refuses a height or width that is no multiple of this.
_PIPELINE_MULTIPLE = 16


class Wan(Family):
    """Wan 2.1 and 2.2, text to video; null space learns pictures on the first transformer.

    The VAE turns `r k + 1` frames, `r` its temporal compression, into `k + 1` latent frames. Wan 2.2 A14B has two
    transformers: `transformer` answers at noisy timesteps, `transformer_2` below `boundary_ratio` of them. Wan 2.2
    TI2V-5B, of a VAE that compresses sides 16 times, has a timestep for every token.
    """

    name = "wan"
    title = "Wan"
    pipelines = ("WanPipeline",)
    modular_blocks = ("WanBlocks", "Wan22Blocks")
    denoiser_class = "WanTransformer3DModel"
    vae_class = "AutoencoderKLWan"
    video_vae = True
    tools = frozenset({"nullspace", "eraser"})
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
        Published("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan2.1-14B", _WAN_14B, torch.bfloat16),
        Published(
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            "Wan2.2-A14B",
            {**_WAN_14B, "transformer_2": _WAN_14B["transformer"]},
            torch.bfloat16,
            {"boundary_ratio": 0.875},
            (
                "UniPCMultistepScheduler",
                {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
            ),
        ),
        Published(
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            "Wan2.2-5B",
            _wan(24, 30, 14336, channels=_TI2V_CHANNELS, vae=_TI2V_VAE),
            torch.bfloat16,
        ),
    )
    smallest_call = {"num_frames": 1}
    call_arguments = {"num_frames": 1}
    blocks = "blocks"
    text_keys = "attn2"
    locates_concepts = True
    masks_padding = True
    # Where text comes in; what it adds in the last block passes no `attn1`.
    joint_attention, joint_blocks, video_alone = "attn2", ("WanTransformerBlock",), True
    text_stream = ()
    attention_linears = ("to_q", "to_k", "to_v", "to_out.0")

    def encode(self, pipeline: WanPipeline, prompts: list[str], negatives: list[str] | None) -> TextConditioning:
        embeds, negative = pipeline.encode_prompt(
            prompt=prompts, negative_prompt=negatives or [""] * len(prompts), max_sequence_length=self.t5_tokens
        )
        return TextConditioning(embeds, negative)

    def token_ids(self, pipeline: WanPipeline, prompt: str) -> list[list[int]]:
        """Of the prompt as the pipeline cleans it."""
        return super().token_ids(pipeline, self.clean_prompt(prompt))

    def clean_prompt(self, prompt: str) -> str:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return prompt_clean(prompt)

    def encode_clip_prompts(self, pipeline: WanPipeline, prompts: list[str]) -> torch.Tensor:
        """Padding is zeros."""
        length = self.prompt_length(pipeline)
        return pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)[0]

    def prompt_length(self, pipeline: WanPipeline) -> int:
        """As long as the call's default, or as the tokenizer of a smaller model says."""
        return min(self.t5_tokens, pipeline.tokenizer.model_max_length)

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

    def text_length(self, config: Any) -> int:
        return self.t5_tokens

    def clip_size(self, config: Any, vae_config: Any) -> tuple[int, int, int]:
        """That of the pipeline's call, or of Wan 2.2 TI2V-5B by its VAE."""
        return (121, 704, 1280) if vae_config.scale_factor_spatial == 16 else (81, 480, 832)

    def latent_shape(
        self, config: Any, vae_config: Any, num_frames: int, height: int, width: int
    ) -> tuple[int, int, int, int]:
        period, spatial = vae_config.scale_factor_temporal, vae_config.scale_factor_spatial
        check_num_frames(num_frames, period)
        for name, pixels, patch in (("height", height, config.patch_size[1]), ("width", width, config.patch_size[2])):
            multiple = math.lcm(_PIPELINE_MULTIPLE, spatial * patch)
            check_pixels(name, pixels, multiple)
        shape = ((num_frames - 1) // period + 1, config.out_channels, height // spatial, width // spatial)
        longest = max(self.token_grid(config, shape))
        if longest > config.rope_max_seq_len:
            raise ValueError(
                f"`num_frames`, `height` and `width` must make at most {config.rope_max_seq_len} tokens along an axis "
                f"for this model's positions, got {longest} of {num_frames} x {height} x {width}."
            )
        return shape

    def token_grid(self, config: Any, latent_shape: Sequence[int]) -> TokenGrid:
        shape = tuple(latent_shape)
        sides, patch = latent_sides(shape), config["patch_size"]
        if any(side % p for side, p in zip(sides, patch, strict=True)):
            raise ValueError(
                f"`latent_shape` must have frames, a height and a width divisible by {tuple(patch)} for this model, "
                f"got {shape}."
            )
        return TokenGrid(*(side // p for side, p in zip(sides, patch, strict=True)))

    def clip_arguments(
        self, text: torch.Tensor, empty: torch.Tensor, latents: torch.Tensor | None = None
    ) -> dict[str, Any]:
        return super().clip_arguments(text, empty, None if latents is None else latents.transpose(1, 2))

    def clip_latents(self, latents: torch.Tensor, latent_shape: Sequence[int]) -> torch.Tensor:
        return latents.transpose(1, 2)

    def expert_timesteps(self, pipeline: WanPipeline) -> dict[str, tuple[float, float]]:
        ratio = pipeline.config.get("boundary_ratio")
        if ratio is None:
            return super().expert_timesteps(pipeline)
        boundary = ratio * pipeline.scheduler.config.get("num_train_timesteps", 1000)
        return {"transformer": (boundary, math.inf), "transformer_2": (-math.inf, boundary)}

    def velocity(
        self, pipeline: WanPipeline, num_frames: int, height: int, width: int, *, expert: str = "transformer"
    ) -> WanVelocity:
        check_flow_levels(pipeline.scheduler, "pipeline.scheduler")
        transformer, experts = getattr(pipeline, expert), self.expert_timesteps(pipeline)
        self.latent_shape(transformer.config, pipeline.vae.config, num_frames, height, width)
        others = tuple((getattr(pipeline, name), served) for name, served in experts.items() if name != expert)
        per_token = bool(pipeline.config.expand_timesteps)
        return WanVelocity(transformer, experts[expert], others, expand_timesteps=per_token)

    def empty_velocity(
        self, transformer: torch.nn.Module, latent_shape: Sequence[int], dtype: torch.dtype
    ) -> WanVelocity:
        """Of a transformer of TI2V-5B, by its channels, with a timestep for every token."""
        return WanVelocity(transformer, expand_timesteps=transformer.config.in_channels == _TI2V_CHANNELS)


class WanVelocity(Velocity):
    """The velocity `noise - x_0` that a text-to-video Wan predicts at `x_t = (1 - sigma) x_0 + sigma noise`.

    Args:
        transformer: `WanTransformer3DModel`, as `Velocity` takes it.
        served: timesteps from and below which it answers, where there are two.
        others: the others, with theirs.
        expand_timesteps: as the pipeline's config has it: a timestep for every token.

    Raises:
        ValueError: a transformer that reads pictures besides.
    """

    flow_matching = True
    latents_dtype = torch.float32

    def __init__(
        self,
        transformer: torch.nn.Module,
        served: tuple[float, float] = (-math.inf, math.inf),
        others: Sequence[tuple[torch.nn.Module, tuple[float, float]]] = (),
        *,
        expand_timesteps: bool = False,
    ) -> None:
        super().__init__(transformer)
        self.served, self.expand_timesteps = served, expand_timesteps
        self.others, self._others_served = tuple(o for o, _ in others), tuple(s for _, s in others)
        if self.config["in_channels"] != self.config["out_channels"]:
            raise ValueError(
                f"`transformer` must be of text-to-video Wan, got {self.config['in_channels']} channels in and "
                f"{self.config['out_channels']} out, of which the others are pictures."
            )

    def serves(self, t: torch.Tensor) -> torch.Tensor:
        """Where timesteps lie in `served`."""
        return _within(t, self.served)

    def token_grid(self, latent_shape: Sequence[int]) -> TokenGrid:
        return Wan().token_grid(self.config, latent_shape)

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        self._check_inputs(x_t, t, prompt_embeds)
        if not self.others:
            return self._ask(self.transformer, x_t, t, prompt_embeds)
        experts = ((self.transformer, self.served), *zip(self.others, self._others_served, strict=True))
        found, rows = [], []
        for model, served in experts:
            chosen = _within(t, served).nonzero().flatten()
            if len(chosen):
                rows.append(chosen)
                found.append(self._ask(model, x_t[chosen], t[chosen], prompt_embeds[chosen]))
        return torch.cat(found)[torch.cat(rows).argsort()]

    def _ask(
        self, model: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor
    ) -> torch.Tensor:
        from diffusers.models.modeling_utils import get_parameter_dtype

        dtype = get_parameter_dtype(model)
        if self.expand_timesteps:
            t = t[:, None].expand(-1, math.prod(self.token_grid(x_t.shape)))
        velocity = model(
            hidden_states=x_t.transpose(1, 2).to(dtype),
            timestep=t,
            encoder_hidden_states=prompt_embeds.to(dtype),
            return_dict=False,
        )[0].transpose(1, 2)
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))

    def _check_inputs(self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor) -> None:
        channels = self.config["out_channels"]
        if x_t.ndim != 5 or x_t.shape[2] != channels:
            raise ValueError(f"`x_t` must be (batch, frames, {channels}, height, width), got {tuple(x_t.shape)}.")
        check_times(t, x_t)
        check_tokens(prompt_embeds, len(x_t), self.config["text_dim"])
        self.token_grid(x_t.shape)


def _within(t: torch.Tensor, served: tuple[float, float]) -> torch.Tensor:
    return (t >= served[0]) & (t < served[1])
