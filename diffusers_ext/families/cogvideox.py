"""CogVideoX 1.0 and 1.5, text-to-video and image-to-video: joint attention of text and video."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.families.family import Family, TokenGrid, Velocity
from diffusers_ext.families.published import T5_XXL, Published
from diffusers_ext.families.velocity import check_num_frames, check_pixels, check_times, check_tokens, latent_sides

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# The pipelines refuse a height or width that is no multiple of this.
_PIPELINE_MULTIPLE = 8
# What the image-to-video pipeline of CogVideoX 1.5 passes.
_PIPELINE_OFS = 2.0

RotaryEmbedding = tuple[torch.Tensor, torch.Tensor]

_FIVE_B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_FIVE_B_1_5 = {
    **_FIVE_B,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 96,
    "sample_width": 170,
    "sample_frames": 81,
}
# What the configs say besides the defaults of `CogVideoXTransformer3DModel`, which are those of 2b.
PUBLISHED_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "CogVideoX-2b": {"num_attention_heads": 30, "num_layers": 30},
    "CogVideoX-5b": _FIVE_B,
    "CogVideoX-5b-I2V": {**_FIVE_B, "in_channels": 32, "use_learned_positional_embeddings": True},
    "CogVideoX1.5-5B": _FIVE_B_1_5,
    "CogVideoX1.5-5B-I2V": {**_FIVE_B_1_5, "in_channels": 32, "ofs_embed_dim": 512},
}


def _published(name: str, transformer: dict[str, Any]) -> Published:
    components = {
        "text_encoder": T5_XXL,
        "vae": ("AutoencoderKLCogVideoX", {}),
        "transformer": ("CogVideoXTransformer3DModel", transformer),
    }
    dtype = torch.float16 if name == "CogVideoX-2b" else torch.bfloat16
    return Published(f"zai-org/{name}", name, components, dtype)


class CogVideoX(Family):
    """CogVideoX; latents are `(frames, channels, height, width)`, text comes before the video.

    The VAE turns `2 r k + 1` frames, `r` its temporal compression, into `2 k + 1` latent frames and back; at any other
    number its decoder returns another number of frames than asked for. CogVideoX 1.5 puts `patch_size_t` latent frames
    in a token, so latent frames are added until they divide; the pipeline drops them, the first ones, before decoding.
    """

    name = "cogvideox"
    title = "CogVideoX"
    pipelines = (
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
    )
    image_pipeline = "CogVideoXImageToVideoPipeline"
    tools = frozenset({"eraser"})
    denoiser_class = "CogVideoXTransformer3DModel"
    comfyui_names = None
    vae_class = "AutoencoderKLCogVideoX"
    joint_attention = "attn1"
    locates_concepts = True
    published = tuple(_published(*model) for model in PUBLISHED_TRANSFORMERS.items())

    def encode_clip_prompts(self, pipeline: DiffusionPipeline, prompts: list[str]) -> torch.Tensor:
        """Padding is not masked."""
        length = self.prompt_length(pipeline)
        ids = pipeline.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return pipeline.text_encoder(ids.to(pipeline.text_encoder.device))[0]

    def text_length(self, config: Any) -> int:
        return config.max_text_seq_length

    def text_width(self, config: Any) -> int:
        return config.text_embed_dim

    def is_joint_attention(self, attention: torch.nn.Module, block: torch.nn.Module) -> bool:
        # By the processor where a model of another family borrows it, by the block where it is wrapped.
        processor = type(getattr(attention, "processor", None)).__name__
        blocks = [parent.__name__ for parent in type(block).__mro__]
        return "CogVideoXBlock" in blocks or "CogVideoX" in processor

    def clip_size(self, config: Any, vae_config: Any) -> tuple[int, int, int]:
        scale = _spatial_compression(vae_config)
        return config.sample_frames, config.sample_height * scale, config.sample_width * scale

    def latent_shape(
        self, config: Any, vae_config: Any, num_frames: int, height: int, width: int
    ) -> tuple[int, int, int, int]:
        period = 2 * vae_config.temporal_compression_ratio
        check_num_frames(num_frames, period)
        spatial = _spatial_compression(vae_config)
        multiple = math.lcm(_PIPELINE_MULTIPLE, spatial * config.patch_size)
        for name, pixels in (("height", height), ("width", width)):
            check_pixels(name, pixels, multiple)
        latent_size = (height // spatial, width // spatial)
        _check_positions(config, latent_size, spatial)
        frames = (num_frames - 1) // vae_config.temporal_compression_ratio + 1
        patch_t = config.patch_size_t or 1
        return (math.ceil(frames / patch_t) * patch_t, config.out_channels, *latent_size)

    def token_grid(self, config: Any, latent_shape: Sequence[int]) -> TokenGrid:
        shape = tuple(latent_shape)
        frames, height, width = latent_sides(shape)
        patch, patch_t = config.patch_size, config.patch_size_t or 1
        if frames % patch_t or height % patch or width % patch:
            raise ValueError(
                f"`latent_shape` must have frames divisible by {patch_t} and a height and width "
                f"divisible by {patch} for this model, got {shape}. `latent_shape()` pads frames."
            )
        return TokenGrid(frames // patch_t, height // patch, width // patch)

    def image_channels(self, config: Any) -> int:
        return config.in_channels - config.out_channels

    @torch.no_grad()
    def image_latents(
        self,
        pipeline: DiffusionPipeline,
        pictures: torch.Tensor,
        latent_shape: Sequence[int],
        generators: Sequence[torch.Generator],
    ) -> torch.Tensor:
        """Channels of first frames, `(pictures, frames, channels, height, width)` float32 on the CPU.

        As `prepare_latents` of the image-to-video pipeline makes them of pictures `(pictures, 3, height, width)` from
        -1 to 1, for clips of a `latent_shape`; generators, one each, sample the posteriors.
        """
        from diffusers_ext.core.restored_state import module_eval_mode

        vae, (frames, channels) = pipeline.vae, latent_shape[:2]
        # The pipeline adds latent frames that patches need to the frames that it asks for.
        num_frames = (frames - 1) * vae.config.temporal_compression_ratio + 1
        size = (len(pictures), channels, num_frames, *pictures.shape[-2:])
        with module_eval_mode(vae):
            _, latents = pipeline.prepare_latents(
                pictures.to(vae.device, vae.dtype),
                *size,
                dtype=vae.dtype,
                device=vae.device,
                generator=list(generators),
                latents=torch.zeros(()),  # none of its own
            )
        return latents.float().cpu()

    def velocity(
        self, pipeline: DiffusionPipeline, num_frames: int, height: int, width: int, **conditions: Any
    ) -> CogVideoXVelocity:
        """See `Family`; `image_latents` is the condition of image-to-video models."""
        return CogVideoXVelocity.from_pipeline(pipeline, num_frames, height, width, **conditions)

    def empty_velocity(
        self, transformer: torch.nn.Module, latent_shape: Sequence[int], dtype: torch.dtype
    ) -> CogVideoXVelocity:
        config, conditions = transformer.config, {}
        if config.use_rotary_positional_embeddings:
            angles = (math.prod(self.token_grid(config, latent_shape)), config.attention_head_dim)
            cosines, sines = (torch.empty(angles, device=transformer.device) for _ in range(2))
            conditions["image_rotary_emb"] = (cosines, sines)
        if config.ofs_embed_dim is not None:
            conditions["ofs"] = _PIPELINE_OFS
        if config.in_channels != config.out_channels:
            conditions["image_latents"] = torch.empty(1, *latent_shape, dtype=dtype, device=transformer.device)
        return CogVideoXVelocity(transformer, **conditions)


class CogVideoXVelocity(Velocity):
    """The velocity `v(x_t, c, t)` that a CogVideoX transformer predicts.

    CogVideoX predicts `v = sqrt(a_t) noise - sqrt(1 - a_t) x_0` (Salimans and Ho 2022, arXiv 2202.00512) with `a_t`
    the scheduler's cumulative alpha. A transformer called without the rotary embedding of its clip runs in silence and
    predicts nonsense, so what this model needs is checked here, once.

    Args:
        transformer: `CogVideoXTransformer3DModel`, as `Velocity` takes it.
        image_rotary_emb: cosines and sines `(video, head_dim)` as the pipeline makes them; for models with rotary
            positions only.
        ofs: frame offset, for CogVideoX 1.5 image-to-video only; its pipeline passes 2.0.
        image_latents: `(pictures, frames, channels, height, width)` latents of first frames, padded as
            `prepare_latents` of the image-to-video pipeline gives them; for image-to-video models only. Latents that
            do not have them already (see `with_image`) take the only one, or one each.

    Raises:
        ValueError: something that this model needs is missing, or given and not used by it.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        *,
        image_rotary_emb: RotaryEmbedding | None = None,
        ofs: float | None = None,
        image_latents: torch.Tensor | None = None,
    ) -> None:
        super().__init__(transformer)
        self.image_rotary_emb = image_rotary_emb
        self.ofs = ofs
        self.image_latents = image_latents
        config = self.config
        is_image_to_video = config["in_channels"] != config["out_channels"]
        rotary = config["use_rotary_positional_embeddings"]
        _check_given("image_rotary_emb", image_rotary_emb, rotary)
        _check_given("ofs", ofs, config["ofs_embed_dim"] is not None)
        _check_given("image_latents", image_latents, is_image_to_video)

    @classmethod
    def from_pipeline(
        cls,
        pipeline: DiffusionPipeline,
        num_frames: int,
        height: int,
        width: int,
        *,
        image_latents: torch.Tensor | None = None,
    ) -> CogVideoXVelocity:
        """For clips of so many frames and pixels, with the pipeline's own rotary embedding.

        Raises:
            ValueError: a scheduler that does not take velocities, a clip that the model cannot take (see
                `CogVideoX.latent_shape`), or missing image latents.
        """
        from diffusers_ext.core.seeds import check_diffusion_levels

        predicts = pipeline.scheduler.config.get("prediction_type")
        if predicts != "v_prediction":
            raise ValueError(
                "`pipeline` must have a scheduler of prediction_type 'v_prediction', got "
                f"{predicts!r}. CogVideoX models predict velocities."
            )
        check_diffusion_levels(pipeline.scheduler, "pipeline.scheduler")
        config, size = pipeline.transformer.config, (num_frames, height, width)
        frames = CogVideoX().latent_shape(config, pipeline.vae.config, *size)[0]
        rotary = None
        if config.use_rotary_positional_embeddings:
            rotary = pipeline._prepare_rotary_positional_embeddings(height, width, frames, pipeline._execution_device)
        ofs = None if config.ofs_embed_dim is None else _PIPELINE_OFS
        return cls(pipeline.transformer, image_rotary_emb=rotary, ofs=ofs, image_latents=image_latents)

    def token_grid(self, latent_shape: Sequence[int]) -> TokenGrid:
        return CogVideoX().token_grid(self.config, latent_shape)

    def with_image(self, latents: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        if self.image_latents is None:
            return latents
        chosen = [number % len(self.image_latents) for number in numbers]
        return torch.cat([latents, self.image_latents[chosen].to(latents)], dim=2)

    def without_image(self, x_t: torch.Tensor) -> torch.Tensor:
        return x_t[:, :, : self.config["out_channels"]]

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Latents must have the video tokens of the rotary embedding."""
        from diffusers.models.modeling_utils import get_parameter_dtype

        self._check_inputs(x_t, t, prompt_embeds)
        dtype = get_parameter_dtype(self.transformer)
        hidden = x_t.to(dtype)
        if hidden.shape[2] < self.config["in_channels"]:
            hidden = self.with_image(hidden, range(len(hidden)))
        if self.image_rotary_emb is not None:
            cosines, sines = self.image_rotary_emb
            self.image_rotary_emb = (cosines.to(x_t.device), sines.to(x_t.device))
        velocity = self.transformer(
            hidden_states=hidden,
            encoder_hidden_states=prompt_embeds.to(dtype),
            timestep=t,
            ofs=None if self.ofs is None else hidden.new_full((1,), self.ofs),
            image_rotary_emb=self.image_rotary_emb,
            return_dict=False,
        )[0]
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))

    def _check_inputs(self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor) -> None:
        channels = self.config["out_channels"]
        if x_t.ndim != 5 or x_t.shape[2] not in (channels, self.config["in_channels"]):
            raise ValueError(f"`x_t` must be (batch, frames, {channels}, height, width), got {tuple(x_t.shape)}.")
        check_times(t, x_t)
        check_tokens(prompt_embeds, len(x_t), self.config["text_embed_dim"])
        image, alone = self.image_latents, x_t.shape[2] == channels
        if image is not None and alone and tuple(image.shape) not in (x_t.shape, (1, *x_t.shape[1:])):
            raise ValueError(
                f"`image_latents` must be (1 or {len(x_t)}, ...) and otherwise like `x_t`, "
                f"{tuple(x_t.shape)}, got {tuple(image.shape)}."
            )
        tokens = math.prod(self.token_grid(x_t.shape))
        if self.image_rotary_emb is not None and len(self.image_rotary_emb[0]) != tokens:
            raise ValueError(
                f"`x_t` must have {len(self.image_rotary_emb[0])} video tokens like the rotary "
                f"embedding, got {tokens} from {tuple(x_t.shape)}. Make one velocity per clip size."
            )


def _spatial_compression(vae_config: Any) -> int:
    return 2 ** (len(vae_config.block_out_channels) - 1)


def _check_positions(config: Mapping[str, Any], latent_size: tuple[int, int], spatial: int) -> None:
    """Refuse sizes for which the model has no positions."""
    largest = (config["sample_height"], config["sample_width"])
    pixels = tuple(side * spatial for side in largest)
    found = tuple(side * spatial for side in latent_size)
    if config["use_learned_positional_embeddings"] and latent_size != largest:
        raise ValueError(
            f"`height` and `width` must be {pixels[0]} and {pixels[1]} for a model with learned "
            f"positions, got {found[0]} and {found[1]}."
        )
    sliced = config["use_rotary_positional_embeddings"] and config["patch_size_t"] is not None
    if sliced and any(side > most for side, most in zip(latent_size, largest)):
        raise ValueError(
            f"`height` and `width` must be at most {pixels[0]} and {pixels[1]} for this model's "
            f"positions, got {found[0]} and {found[1]}."
        )


def _check_given(name: str, value: object, needed: bool) -> None:
    if needed and value is None:
        raise ValueError(
            f"`{name}` must be given to this model, got None. `CogVideoXVelocity.from_pipeline` "
            "takes what the pipeline itself passes."
        )
    if not needed and value is not None:
        raise ValueError(f"`{name}` must be None for a model that does not use it, got a value.")
