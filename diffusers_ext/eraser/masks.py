"""Where a concept is in a clip: masks from the attention that the video pays to its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from diffusers_ext.eraser.clip_geometry import token_grid
from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.eraser.outputs import erasers_disabled
from diffusers_ext.eraser.velocity import CogVideoXVelocity


@torch.no_grad()
def concept_mask(
    velocity: CogVideoXVelocity,
    x_t: torch.Tensor,
    t: torch.Tensor,
    prompt_embeds: torch.Tensor,
    token_mask: torch.Tensor,
    *,
    threshold: float | None = None,
    layers: Sequence[int] | None = None,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """Where the model without its erasers sees a concept, in one pass without gradient.

    A trainer that runs the teacher anyway opens `concept_attention` around that pass instead and
    calls `normalize_attention`.

    Args:
        velocity: of the clip's size.
        x_t: `(batch, frames, channels, height, width)` noisy latents.
        t: `(batch,)` timesteps.
        prompt_embeds: `(batch, text, text_dim)`.
        token_mask: `(batch, text)` bool, true at the concept's tokens.
        threshold: in (0, 1] for masks of zeros and ones; soft masks when `None`.
        layers: indices of transformer blocks; all when `None`.
        chunk_size: see `attention_mass`.

    Returns:
        `(batch, frames', rows, columns)` float32 in [0, 1] on the grid of video tokens; zero where
        the prompt does not name the concept.
    """
    model = velocity.model
    attention = concept_attention(model, token_mask, layers=layers, chunk_size=chunk_size)
    with erasers_disabled(model), attention as found:
        velocity(x_t, t, prompt_embeds)
    return normalize_attention(found.maps, token_grid(model, x_t.shape), threshold)


def normalize_attention(
    maps: torch.Tensor, grid: Sequence[int], threshold: float | None = None
) -> torch.Tensor:
    """Scale maps to [0, 1] over the whole clip, frames together.

    `(A - min A) / (max A - min A)`; a frame without the concept stays dark beside one that has it.

    Args:
        maps: `(batch, video)`; constant maps (no concept token) become zero.
        grid: `(frames, rows, columns)` of the video tokens.
        threshold: in (0, 1]; values from it on become 1, others 0. Soft masks when `None`.

    Returns:
        `(batch, frames, rows, columns)` float32.

    Raises:
        ValueError: `grid` does not hold the tokens, or `threshold` is out of range.
    """
    if maps.ndim != 2 or maps.shape[1] != grid[0] * grid[1] * grid[2]:
        raise ValueError(
            f"`maps` must be (batch, {' x '.join(map(str, grid))}), got {tuple(maps.shape)}."
        )
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be above 0 and at most 1, got {threshold}.")
    maps = maps.float()
    low, high = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
    span = high - low
    mask = torch.where(span > 0, (maps - low) / torch.where(span > 0, span, 1), 0)
    if threshold is not None:
        mask = (mask >= threshold).float()
    return mask.unflatten(1, tuple(grid))


def velocity_difference(
    v_concept: torch.Tensor, v_anchor: torch.Tensor, grid: Sequence[int]
) -> torch.Tensor:
    """How far the teacher's velocities with and without the concept lie apart, token by token.

    `sqrt(mean over a token's latents of (v(x_t, c) - v(x_t, anchor))^2)`.

    Args:
        v_concept: `(batch, frames, channels, height, width)`.
        v_anchor: the same at the same `x_t` with the anchor prompt.
        grid: `(frames, rows, columns)` of the video tokens.

    Returns:
        `(batch, video)` float32.

    Raises:
        ValueError: shapes that differ, or latents that the grid does not tile.
    """
    if v_concept.shape != v_anchor.shape or v_concept.ndim != 5:
        raise ValueError(
            "`v_anchor` must be (batch, frames, channels, height, width) like `v_concept`, "
            f"{tuple(v_concept.shape)}, got {tuple(v_anchor.shape)}."
        )
    frames, _, height, width = v_concept.shape[1:]
    _check_tiling((frames, height, width), grid)
    squares = (v_concept.float() - v_anchor.float()).square().mean(dim=2)
    return F.adaptive_avg_pool3d(squares, tuple(grid)).sqrt().flatten(1)


def mask_to_tokens(mask: torch.Tensor) -> torch.Tensor:
    """A mask `(batch, frames, rows, columns)` on the token grid as `(batch, video, 1)`."""
    return mask.flatten(1).unsqueeze(-1)


def mask_to_latents(mask: torch.Tensor, latent_shape: Sequence[int]) -> torch.Tensor:
    """A mask on the token grid for latents: each token's value at all latents of its patch.

    Args:
        mask: `(batch, frames', rows, columns)`.
        latent_shape: `(frames, channels, height, width)`, with or without a batch before.

    Returns:
        `(batch, frames, 1, height, width)`.

    Raises:
        ValueError: latents that the grid does not tile.
    """
    frames, _, height, width = latent_shape[-4:]
    size = (frames, height, width)
    _check_tiling(size, mask.shape[1:])
    for axis, (latents, tokens) in enumerate(zip(size, mask.shape[1:]), start=1):
        mask = mask.repeat_interleave(latents // tokens, dim=axis)
    return mask.unsqueeze(2)


def _check_tiling(size: Sequence[int], grid: Sequence[int]) -> None:
    if any(latents % tokens for latents, tokens in zip(size, grid, strict=True)):
        raise ValueError(
            "`grid` must divide the latents' (frames, height, width), got "
            f"{tuple(grid)} for {tuple(size)}."
        )
