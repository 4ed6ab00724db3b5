"""HunyuanVideo: flow matching over clips, joint attention of video and text, the guidance scale as an input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.core.seeds import check_flow_levels
from diffusers_ext.families.family import Family, TokenGrid, Velocity
from diffusers_ext.families.published import CLIP_L, LLAMA_3_8B, Published
from diffusers_ext.families.text_conditioning import TextConditioning, refuse_negative_prompts
from diffusers_ext.families.velocity import check_num_frames, check_pixels, check_times, check_tokens, latent_sides

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

# The pipeline refuses a height or width that is no multiple of this.
_PIPELINE_MULTIPLE = 16
# The scale where the pipeline's call is given none, and its factor.
_PIPELINE_GUIDANCE, _GUIDANCE_FACTOR = 6.0, 1000.0


class HunyuanVideo(Family):
    """HunyuanVideo, text to video; its text is Llama's tokens, video comes before it, and CLIP's pooled text.

    The VAE turns `r k + 1` frames, `r` its temporal compression, into `k + 1` latent frames. Of its blocks, the twenty
    with a stream for each have an output projection of video tokens alone, where erasers attach; in the forty others
    attention and feed-forward share one projection.
    """

    name = "hunyuan_video"
    title = "HunyuanVideo"
    pipelines = ("HunyuanVideoPipeline",)
    denoiser_class = "HunyuanVideoTransformer3DModel"
    vae_class = "AutoencoderKLHunyuanVideo"
    video_vae = True
    flow_matching = True
    own_levels = True
    tools = frozenset({"eraser"})
    comfyui_names = None
    text_fields = ("prompt_embeds", "attention_mask", "pooled_prompt_embeds")
    text_outputs = {"prompt_embeds": 0, "pooled_prompt_embeds": 1, "attention_mask": 2}
    joint_attention = "attn"
    joint_blocks = ("HunyuanVideoTransformerBlock", "HunyuanVideoTokenReplaceTransformerBlock")
    published = (
        Published(
            "hunyuanvideo-community/HunyuanVideo",
            "HunyuanVideo",
            {
                "text_encoder": LLAMA_3_8B,
                "transformer": ("HunyuanVideoTransformer3DModel", {}),
                "vae": ("AutoencoderKLHunyuanVideo", {}),
                "text_encoder_2": CLIP_L,
            },
            torch.bfloat16,
        ),
    )

    def encode(
        self, pipeline: HunyuanVideoPipeline, prompts: list[str], negatives: list[str] | None
    ) -> TextConditioning:
        refuse_negative_prompts(negatives)
        embeds, pooled, mask = pipeline.encode_prompt(prompt=list(prompts))
        return TextConditioning(embeds, attention_mask=mask, pooled_prompt_embeds=pooled)

    def text_length(self, config: Any) -> int:
        """What the pipeline's call reads by default."""
        return 256

    def text_width(self, config: Any) -> int:
        return config.text_embed_dim

    def pooled_width(self, config: Any) -> int:
        return config.pooled_projection_dim

    def embedded_guidance(self, config: Any) -> bool:
        return bool(config["guidance_embeds"])

    def grid_arguments(self, config: Any, num_steps: int, image_tokens: int) -> dict[str, Any]:
        """Levels alone; the shift is the scheduler's own."""
        return {"sigmas": [1 - i / num_steps for i in range(num_steps)]}

    def clip_size(self, config: Any, vae_config: Any) -> tuple[int, int, int]:
        """What the pipeline's call draws by default."""
        return 129, 720, 1280

    def latent_shape(
        self, config: Any, vae_config: Any, num_frames: int, height: int, width: int
    ) -> tuple[int, int, int, int]:
        period, spatial = vae_config.temporal_compression_ratio, vae_config.spatial_compression_ratio
        check_num_frames(num_frames, period)
        multiple = math.lcm(_PIPELINE_MULTIPLE, spatial * config.patch_size)
        for name, pixels in (("height", height), ("width", width)):
            check_pixels(name, pixels, multiple)
        shape = ((num_frames - 1) // period + 1, config.out_channels, height // spatial, width // spatial)
        self.token_grid(config, shape)
        return shape

    def token_grid(self, config: Any, latent_shape: Sequence[int]) -> TokenGrid:
        shape = tuple(latent_shape)
        frames, height, width = latent_sides(shape)
        patch, patch_t = config["patch_size"], config["patch_size_t"]
        if frames % patch_t or height % patch or width % patch:
            raise ValueError(
                f"`latent_shape` must have frames divisible by {patch_t} and a height and width "
                f"divisible by {patch} for this model, got {shape}."
            )
        return TokenGrid(frames // patch_t, height // patch, width // patch)

    def clip_arguments(
        self, text: TextConditioning, empty: TextConditioning, latents: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """The call is not guided away from other prompts: the model takes the scale as an input."""
        arguments = self.text_arguments(text)
        return arguments if latents is None else {**arguments, "latents": latents.transpose(1, 2)}

    def clip_latents(self, latents: torch.Tensor, latent_shape: Sequence[int]) -> torch.Tensor:
        return latents.transpose(1, 2)

    def velocity(
        self,
        pipeline: HunyuanVideoPipeline,
        num_frames: int,
        height: int,
        width: int,
        *,
        guidance_scale: float = _PIPELINE_GUIDANCE,
        **conditions: Any,
    ) -> HunyuanVideoVelocity:
        check_flow_levels(pipeline.scheduler, "pipeline.scheduler")
        self.latent_shape(pipeline.transformer.config, pipeline.vae.config, num_frames, height, width)
        return HunyuanVideoVelocity(pipeline.transformer, guidance_scale)

    def empty_velocity(
        self, transformer: torch.nn.Module, latent_shape: Sequence[int], dtype: torch.dtype
    ) -> HunyuanVideoVelocity:
        return HunyuanVideoVelocity(transformer)


class HunyuanVideoVelocity(Velocity):
    """The velocity `noise - x_0` that a text-to-video HunyuanVideo predicts at `x_t = (1 - sigma) x_0 + sigma noise`.

    Args:
        transformer: `HunyuanVideoTransformer3DModel`, as `Velocity` takes it.
        guidance_scale: that a model distilled by guidance takes as an input.

    Raises:
        ValueError: a transformer that reads a picture besides.
    """

    flow_matching = True
    latents_dtype = torch.float32
    text_fields, text_rule = HunyuanVideo.text_fields, "a mask and pooled text"

    def __init__(self, transformer: torch.nn.Module, guidance_scale: float = _PIPELINE_GUIDANCE) -> None:
        super().__init__(transformer)
        kind = self.config["image_condition_type"]
        if kind is not None:
            raise ValueError(f"`transformer` must be of text-to-video HunyuanVideo, got image conditions by {kind!r}.")
        self.embedded_guidance = guidance_scale if self.config["guidance_embeds"] else None

    def token_grid(self, latent_shape: Sequence[int]) -> TokenGrid:
        return HunyuanVideo().token_grid(self.config, latent_shape)

    def set_timesteps(self, scheduler: Any, num_steps: int, latent_shape: Sequence[int], device: Any = None) -> None:
        scheduler.set_timesteps(device=device, **HunyuanVideo().grid_arguments(scheduler.config, num_steps, 0))

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: TextConditioning) -> torch.Tensor:
        from diffusers.models.modeling_utils import get_parameter_dtype

        self._check_inputs(x_t, t, prompt_embeds)
        dtype = get_parameter_dtype(self.transformer)
        hidden, guidance = x_t.transpose(1, 2).to(dtype), None
        if self.embedded_guidance is not None:
            guidance = hidden.new_full((len(x_t),), self.embedded_guidance) * _GUIDANCE_FACTOR
        velocity = self.transformer(
            hidden_states=hidden,
            timestep=t.float(),
            encoder_hidden_states=prompt_embeds.prompt_embeds.to(dtype),
            encoder_attention_mask=prompt_embeds.attention_mask.to(dtype),
            pooled_projections=prompt_embeds.pooled_prompt_embeds.to(dtype),
            guidance=guidance,
            return_dict=False,
        )[0].transpose(1, 2)
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))

    def _check_inputs(self, x_t: torch.Tensor, t: torch.Tensor, text: TextConditioning) -> None:
        channels = self.config["out_channels"]
        if x_t.ndim != 5 or x_t.shape[2] != channels:
            raise ValueError(f"`x_t` must be (batch, frames, {channels}, height, width), got {tuple(x_t.shape)}.")
        check_times(t, x_t)
        if not isinstance(text, TextConditioning) or not {*self.text_fields} <= text.tensors().keys():
            raise TypeError(f"`prompt_embeds` must be a TextConditioning with {self.text_rule}, got other text.")
        check_tokens(text.prompt_embeds, len(x_t), self.config["text_embed_dim"])
        self.token_grid(x_t.shape)
