"""One call of a video transformer for clips of one size, with the conditions of its pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel


class TokenGrid(NamedTuple):
    """How many video tokens lie along each axis; tokens run frame by frame, row by row."""

    frames: int
    rows: int
    columns: int


class Velocity:
    """The velocity `v(x_t, c, t)` that a video transformer predicts; each family has its own.

    Args:
        transformer: also as PEFT model, compiled, or wrapped for distributed training; called as it is, with its
            adapters, mode and gradients.
    """

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.transformer = transformer

    @property
    def model(self) -> torch.nn.Module:
        """The transformer without the wrapper of distributed training."""
        wrapped = isinstance(self.transformer, DistributedDataParallel)
        return self.transformer.module if wrapped else self.transformer

    @property
    def config(self) -> Mapping[str, Any]:
        """The transformer's config."""
        return self.model.config

    def token_grid(self, latent_shape: Sequence[int]) -> TokenGrid:
        """See `VideoFamily.token_grid`."""
        raise NotImplementedError

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Predict.

        Args:
            x_t: `(batch, frames, channels, height, width)` noisy latents; cast to the model's dtype.
            t: `(batch,)` timesteps on the scheduler's scale.
            prompt_embeds: `(batch, text, text_dim)`; cast to the model's dtype.

        Returns:
            Velocity, the shape of `x_t`, float32 (float64 from a float64 model).

        Raises:
            ValueError: tensors that do not fit each other or the model.
        """
        raise NotImplementedError
