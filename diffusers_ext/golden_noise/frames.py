"""Clips as batches of pictures, which is what golden-noise networks know."""

from __future__ import annotations

import torch


def as_pictures(latents: torch.Tensor) -> torch.Tensor:
    """Clips `(batch, channels, frames, height, width)` as `(batch * frames, channels, height, width)`; others stay."""
    return latents.transpose(1, 2).flatten(0, 1) if latents.ndim == 5 else latents


def as_clips(pictures: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The way back: pictures arranged as the latents `like` that they were made of."""
    return pictures.unflatten(0, (len(like), -1)).transpose(1, 2) if like.ndim == 5 else pictures
