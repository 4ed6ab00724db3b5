"""Pictures as clips of one frame: what an eraser's training asks of families whose `predict` draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from diffusers_ext.families.family import Family, TokenGrid, Velocity
from diffusers_ext.families.text_conditioning import Text, TextConditioning, replace_rows, with_negatives
from diffusers_ext.families.velocity import check_times, check_tokens


class PictureFamily(Family):
    """A family of image models that erasers are trained on."""

    draws_pictures = True
    prediction_types = ("epsilon", "v_prediction")
    guidance_offset: ClassVar[float] = 0.0  # what the pipeline's call adds to its `guidance_scale`

    def side_multiple(self, config: Any, vae_config: Any) -> int:
        """What heights and widths in pixels must be multiples of."""
        return self.pixels_per_side(vae_config) * self.patch(config)

    def pixels_per_side(self, vae_config: Any) -> int:
        """As `pixels_per_latent`, by the VAE's config."""
        return 2 ** (len(vae_config.block_out_channels) - 1)

    def encode_clip_prompts(self, pipeline: Any, prompts: list[str]) -> Text:
        """The unconditional prompt is what the call takes by itself: zeros, for SDXL, and not an empty text."""
        both = self.encode(pipeline, list(prompts), None)
        given, positive = both.tensors(), both.positive()
        names = [name for name in given if name.startswith("negative_")]
        negative = TextConditioning(**{name.removeprefix("negative_"): given[name] for name in names})
        empty = torch.tensor([prompt == "" for prompt in prompts], device=positive.prompt_embeds.device)
        found = replace_rows(positive, empty, negative)
        return found.prompt_embeds if self.text_fields == ("prompt_embeds",) else found

    def prompt_length(self, pipeline: Any) -> int:
        """Tokens of the first encoder."""
        return self.text_call(pipeline).get("max_sequence_length") or min(
            pipeline.tokenizer.model_max_length, self.longest_text
        )

    def size_arguments(self, num_frames: int, height: int, width: int) -> dict[str, int]:
        return {"height": height, "width": width}

    def clip_arguments(self, text: Text, empty: Text, latents: torch.Tensor | None = None) -> dict[str, Any]:
        arguments = self.text_arguments(with_negatives(as_conditioning(text), as_conditioning(empty)))
        return arguments if latents is None else {**arguments, "latents": latents[:, 0]}

    def clip_latents(self, latents: torch.Tensor, latent_shape: Sequence[int]) -> torch.Tensor:
        """Packed ones, `(batch, tokens, channels)`, are unpacked."""
        if latents.ndim == 3:
            latents = latents.transpose(1, 2).reshape(len(latents), *latent_shape[1:])
        return latents.unsqueeze(1)

    def clip_size(self, config: Any, vae_config: Any) -> tuple[int, int, int]:
        size, scale = self.sample_size(config), self.pixels_per_side(vae_config)
        height, width = (size, size) if isinstance(size, int) else size
        return 1, height * scale, width * scale

    def latent_shape(
        self, config: Any, vae_config: Any, num_frames: int, height: int, width: int
    ) -> tuple[int, int, int, int]:
        if num_frames != 1:
            raise ValueError(f"`num_frames` must be 1 for a model that draws pictures, got {num_frames}.")
        scale, multiple = self.pixels_per_side(vae_config), self.side_multiple(config, vae_config)
        for name, pixels in (("height", height), ("width", width)):
            if pixels < 1 or pixels % multiple:
                nearest = max(round(pixels / multiple), 1) * multiple
                raise ValueError(
                    f"`{name}` must be a positive multiple of {multiple} for this model, got {pixels}. "
                    f"The nearest is {nearest}."
                )
        shape = (1, self.latent_channels(config), height // scale, width // scale)
        longest, most = max(self.token_grid(config, shape)), self.longest_side(config)
        if most is not None and longest > most:
            raise ValueError(
                f"`height` and `width` must make at most {most} tokens along a side for this model's positions, got "
                f"{longest} of {height} x {width}."
            )
        return shape

    def token_grid(self, config: Any, latent_shape: Sequence[int]) -> TokenGrid:
        shape, patch = tuple(latent_shape), self.patch(config)
        if len(shape) not in (4, 5) or shape[-4] != 1 or shape[-2] % patch or shape[-1] % patch:
            raise ValueError(
                f"`latent_shape` must be (1, channels, height, width) with sides divisible by {patch}, with or "
                f"without a batch before, got {shape}."
            )
        return TokenGrid(1, shape[-2] // patch, shape[-1] // patch)

    def velocity(
        self, pipeline: Any, num_frames: int, height: int, width: int, *, guidance_scale: float = 1.0
    ) -> PictureVelocity:
        """See `Family`; models that take the guidance scale as an input get this one."""
        config = getattr(pipeline, self.denoiser).config
        self.latent_shape(config, pipeline.vae.config, num_frames, height, width)
        return PictureVelocity(self, pipeline, guidance_scale)


def as_conditioning(text: Text) -> TextConditioning:
    """Text that is token embeddings alone, as a conditioning."""
    return TextConditioning(text) if isinstance(text, torch.Tensor) else text


class _Denoiser:
    """A denoiser that is called as it is, with the config that wrappers of it hide."""

    def __init__(self, model: torch.nn.Module, config: Mapping[str, Any]) -> None:
        self.model, self.config = model, config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class _PipelineWith:
    """A pipeline with another denoiser, for `Family.predict`."""

    def __init__(self, pipeline: Any, name: str, denoiser: _Denoiser) -> None:
        self._pipeline = pipeline
        setattr(self, name, denoiser)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)


class PictureVelocity(Velocity):
    """What an image model predicts of `x_t`, a clip of one frame, as `Family.predict` asks it.

    That is a velocity `noise - x_0`, or noise where the scheduler says so: anchors, guidance and distances are affine
    in either at the same `x_t` and `t`.
    """

    def __init__(self, family: PictureFamily, pipeline: Any, guidance_scale: float) -> None:
        super().__init__(getattr(pipeline, family.denoiser))
        self.family, self.pipeline, self.flow_matching = family, pipeline, family.flow_matching
        self.prediction_types, self.latents_dtype = family.prediction_types, family.latents_dtype
        self.embedded_guidance = guidance_scale if family.embedded_guidance(self.config) else None

    def guidance_weight(self, guidance_scale: float) -> float:
        return super().guidance_weight(guidance_scale + self.family.guidance_offset)

    def token_grid(self, latent_shape: Sequence[int]) -> TokenGrid:
        return self.family.token_grid(self.config, latent_shape)

    def set_timesteps(self, scheduler: Any, num_steps: int, latent_shape: Sequence[int], device: Any = None) -> None:
        tokens = math.prod(self.token_grid(latent_shape))
        given = self.family.grid_arguments(scheduler.config, num_steps, tokens) if self.flow_matching else {}
        scheduler.set_timesteps(num_steps, device=device, **given)

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: Text) -> torch.Tensor:
        from diffusers.models.modeling_utils import get_parameter_dtype

        text = as_conditioning(prompt_embeds)
        self._check_inputs(x_t, t, text)
        dtype = get_parameter_dtype(self.transformer)
        pipeline = _PipelineWith(self.pipeline, self.family.denoiser, _Denoiser(self.transformer, self.config))
        text, guidance = text.to(x_t.device, dtype), self.embedded_guidance or 1.0
        found = self.family.predict(pipeline, x_t[:, 0].to(dtype), t, text, guidance).unsqueeze(1)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def _check_inputs(self, x_t: torch.Tensor, t: torch.Tensor, text: TextConditioning) -> None:
        channels = self.family.latent_channels(self.config)
        if x_t.ndim != 5 or x_t.shape[1:3] != (1, channels):
            raise ValueError(f"`x_t` must be (batch, 1, {channels}, height, width), got {tuple(x_t.shape)}.")
        check_times(t, x_t)
        missing = sorted({*self.family.text_fields} - text.tensors().keys())
        if missing:
            raise ValueError(f"`prompt_embeds` must hold {missing} for this model, got {sorted(text.tensors())}.")
        check_tokens(text.prompt_embeds, len(x_t), self.family.text_width(self.config))
        self.token_grid(x_t.shape)
