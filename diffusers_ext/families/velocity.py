"""The velocity that a transformer predicts of clips, the grid of their tokens and the scale of their latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from diffusers_ext.families.text_conditioning import Text


class TokenGrid(NamedTuple):
    """How many video tokens lie along each axis; tokens run frame by frame, row by row."""

    frames: int
    rows: int
    columns: int


def check_num_frames(num_frames: int, period: int) -> None:
    """Raise `ValueError` unless a VAE that joins frames by `period`, but for the first, takes so many."""
    if num_frames < 1 or num_frames % period != 1 % period:
        nearest = max(round((num_frames - 1) / period), 0) * period + 1
        raise ValueError(
            f"`num_frames` must be a multiple of {period} plus 1 for this VAE, got {num_frames}. "
            f"The nearest is {nearest}."
        )


def check_pixels(name: str, pixels: int, multiple: int) -> None:
    """Raise `ValueError` unless the side called `name` is a positive multiple."""
    if pixels < 1 or pixels % multiple:
        nearest = max(round(pixels / multiple), 1) * multiple
        raise ValueError(
            f"`{name}` must be a positive multiple of {multiple} for this model, got {pixels}. "
            f"The nearest is {nearest}."
        )


def latent_sides(latent_shape: Sequence[int]) -> tuple[int, int, int]:
    """Frames, height and width of latents `(frames, channels, height, width)`, batched or not; else `ValueError`."""
    shape = tuple(latent_shape)
    if len(shape) not in (4, 5):
        raise ValueError(
            f"`latent_shape` must be (frames, channels, height, width), with or without a batch before, got {shape}."
        )
    return shape[-4], shape[-2], shape[-1]


def check_times(t: torch.Tensor, x_t: torch.Tensor) -> None:
    """Raise `ValueError` unless there is a timestep for each row of `x_t`."""
    if t.shape != x_t.shape[:1]:
        raise ValueError(f"`t` must be ({len(x_t)},) like the batch of `x_t`, got {tuple(t.shape)}.")


def check_tokens(tokens: torch.Tensor, rows: int, width: int) -> None:
    """Raise `ValueError` unless text is `(rows, text, width)`."""
    if tokens.ndim != 3 or tokens.shape[::2] != (rows, width):
        raise ValueError(f"`prompt_embeds` must be ({rows}, text, {width}), got {tuple(tokens.shape)}.")


def latent_scale(vae: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Offset and factor, float32 `(1, channels or 1, 1, 1)`: `denoiser's latents = (VAE's - offset) * factor`."""
    config = vae.config
    means, stds = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if means is None or stds is None:
        means, stds = [getattr(config, "shift_factor", None) or 0.0], [1.0]
    offset, spread = (
        torch.tensor(values, dtype=torch.float32, device=vae.device).view(1, -1, 1, 1) for values in (means, stds)
    )
    return offset, getattr(config, "scaling_factor", 1.0) / spread


class Velocity:
    """The velocity `v(x_t, c, t)` that a transformer predicts of clips, or of pictures as clips of one frame.

    Each family has its own. The transformer, also a PEFT model, compiled, or wrapped for distributed training, is
    called as it is: with its adapters, mode and gradients. Where a model has several, each for its own timesteps,
    `transformer` is the one that is asked about or trained, and `others` answer where it does not.
    """

    # `noise - x_0` on straight paths; otherwise `v_prediction`, see `predictions.py`.
    flow_matching: bool = False
    prediction_types: tuple[str, ...] = ("v_prediction",)  # of its schedulers, without flow matching
    latents_dtype: ClassVar[torch.dtype | None] = None  # that the pipeline's call denoises in; `None` for the text's
    others: tuple[torch.nn.Module, ...] = ()
    # The scale that the model takes as an input; its runs are not guided by the empty prompt.
    embedded_guidance: float | None = None

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.transformer = transformer

    def guidance_weight(self, guidance_scale: float) -> float:
        """The `w` of `v(empty) + w (v(prompt) - v(empty))` that the pipeline's call makes of its scale; else 1."""
        return guidance_scale if guidance_scale > 1 and self.embedded_guidance is None else 1.0

    @property
    def model(self) -> torch.nn.Module:
        """The transformer without the wrapper of distributed training."""
        wrapped = isinstance(self.transformer, DistributedDataParallel)
        return self.transformer.module if wrapped else self.transformer

    @property
    def config(self) -> Mapping[str, Any]:
        """The transformer's config."""
        return self.model.config

    @property
    def models(self) -> tuple[torch.nn.Module, ...]:
        """All that may answer."""
        return self.model, *self.others

    def serves(self, t: torch.Tensor) -> torch.Tensor:
        """At which timesteps `transformer` itself answers, bool like `t`."""
        return torch.ones_like(t, dtype=torch.bool)

    def set_timesteps(self, scheduler: Any, num_steps: int, latent_shape: Sequence[int], device: Any = None) -> None:
        """Let a scheduler make the timesteps that the pipeline's call has for a clip; see `Family.grid_arguments`."""
        scheduler.set_timesteps(num_steps, device=device)

    def token_grid(self, latent_shape: Sequence[int]) -> TokenGrid:
        """See `Family.token_grid`."""
        raise NotImplementedError

    def state_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the latents that runs move for clips of these latents: of clips with sound, the sound's too."""
        return tuple(latent_shape)

    def of_state(self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: Text) -> torch.Tensor:
        """What moves those latents; of the clip alone, by `without_image`, it is the velocity."""
        return self(x_t, t, prompt_embeds)

    def with_image(self, latents: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """Latents as the model reads them: of image-to-video models, with the channels of these first frames behind.

        Number `n` is first frame `n` modulo their count.
        """
        return latents

    def without_image(self, x_t: torch.Tensor) -> torch.Tensor:
        """The way back from `with_image`."""
        return x_t

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: Text) -> torch.Tensor:
        """The velocity, the shape of `x_t` without an image, float32 (float64 from a float64 model).

        Args:
            x_t: `(batch, frames, channels, height, width)` noisy latents, as they are or as `with_image` gives them.
            t: `(batch,)` timesteps on the scheduler's scale, integers or floats as it has them.
            prompt_embeds: what `Family.encode_clip_prompts` gives, one row a clip.

        Raises:
            ValueError: tensors that do not fit each other or the model.
        """
        raise NotImplementedError
