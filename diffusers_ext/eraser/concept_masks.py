"""Where a concept is in a clip: masks from attention to its tokens and from what it does to velocities.

Shapes: `x_t` and velocities `(batch, frames, channels, height, width)`, `t` `(batch,)`, embeddings `(batch, text,
text_dim)`, a `token_mask` `(batch, text)` bool, true at the concept's tokens, a `grid` `(frames, rows, columns)` of
the video tokens, `maps` `(batch, video)`, and masks `(batch, frames', rows, columns)` float32 in [0, 1] on that grid.
A `threshold` in (0, 1] makes them hard: values from it on become 1, others 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from diffusers_ext.eraser.adapter.outputs import frozen_teacher
from diffusers_ext.eraser.concept_attention import agreement_weights, concept_attention, head_correlations
from diffusers_ext.families.family import Velocity

# Of a clip's tokens; the concept fills less of a clip than the rest does.
CONCEPT_FLOOR = 0.5


def velocity_mask(
    v_concept: torch.Tensor,
    v_anchor: torch.Tensor,
    token_mask: torch.Tensor,
    grid: Sequence[int],
    v_empty: torch.Tensor | None = None,
    *,
    threshold: float | None = None,
) -> torch.Tensor:
    """Where a concept changes the teacher's velocity: a mask that costs no further pass.

    `velocity_difference` with its lower half (the clip's median) as zero. With the velocity of the empty prompt it is
    `sqrt(|v_concept - v_anchor| |v_concept - v_empty|)`: where the concept matters and the prompt does, which leaves
    out what the anchor word itself adds. All velocities are at the same `x_t`; rows without any concept token get a
    mask of zeros.
    """
    if len(token_mask) != len(v_concept):
        raise ValueError(f"`token_mask` must have one row per clip, {len(v_concept)}, got {len(token_mask)}.")
    maps = velocity_difference(v_concept, v_anchor, grid)
    if v_empty is not None:
        maps = (maps * velocity_difference(v_concept, v_empty, grid)).sqrt()
    named = token_mask.any(dim=1, keepdim=True).to(maps.device)
    return normalize_attention(torch.where(named, maps, 0), grid, threshold, floor=CONCEPT_FLOOR)


def weighted_attention_mask(
    maps: torch.Tensor,
    v_concept: torch.Tensor,
    v_anchor: torch.Tensor,
    token_mask: torch.Tensor,
    grid: Sequence[int],
    v_empty: torch.Tensor | None = None,
    *,
    threshold: float | None = None,
) -> torch.Tensor:
    """Where weighted heads look at a concept and it changes the velocity: the best mask there is.

    `sqrt(attended * velocity_mask)`, `attended` being the maps of `concept_attention` with `head_weights`, with their
    lower half as zero.
    """
    attended = normalize_attention(maps, grid, floor=CONCEPT_FLOOR)
    changed = velocity_mask(v_concept, v_anchor, token_mask, grid, v_empty)
    mask = (attended * changed).sqrt()
    return mask if threshold is None else harden(mask, threshold)


def normalize_attention(
    maps: torch.Tensor, grid: Sequence[int], threshold: float | None = None, *, floor: float = 0.0
) -> torch.Tensor:
    """Scale maps to masks over the whole clip, frames together.

    `(A - low) / (max A - low)`, at least 0, with `low` the minimum or a quantile of A. A frame without the concept
    stays dark beside one that has it; constant maps (no concept token) become zero. A share `floor` in [0, 1) of a
    clip's tokens is background, and its largest value is 0.
    """
    if maps.ndim != 2 or maps.shape[1] != grid[0] * grid[1] * grid[2]:
        raise ValueError(f"`maps` must be (batch, {' x '.join(map(str, grid))}), got {tuple(maps.shape)}.")
    if not 0 <= floor < 1:
        raise ValueError(f"`floor` must be at least 0 and below 1, got {floor}.")
    maps = maps.float()
    if not len(maps):  # quantiles of nothing are refused
        return maps.unflatten(1, tuple(grid))
    low, high = maps.quantile(floor, dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
    span = high - low
    # Not `span > 0`: maps with NaN must not pass for maps without the concept.
    mask = torch.where(span != 0, (maps - low) / torch.where(span != 0, span, 1), 0).clamp(min=0)
    mask = mask.unflatten(1, tuple(grid))
    return mask if threshold is None else harden(mask, threshold)


def harden(mask: torch.Tensor, threshold: float) -> torch.Tensor:
    """1 where a soft mask reaches a threshold in (0, 1], 0 elsewhere."""
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be above 0 and at most 1, got {threshold}.")
    return (mask >= threshold).float()


def velocity_difference(v_concept: torch.Tensor, v_anchor: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """How far the teacher's velocities with and without the concept lie apart, token by token.

    Maps of `sqrt(mean over a token's latents of (v(x_t, c) - v(x_t, anchor))^2)`, float32.
    """
    if v_concept.shape != v_anchor.shape or v_concept.ndim != 5:
        raise ValueError(
            "`v_anchor` must be (batch, frames, channels, height, width) like `v_concept`, "
            f"{tuple(v_concept.shape)}, got {tuple(v_anchor.shape)}."
        )
    frames, _, height, width = v_concept.shape[1:]
    _check_tiling((frames, height, width), grid)
    # Mean over channels, then over the latents of each token: patches tile (frames, height, width).
    squares = (v_concept.float() - v_anchor.float()).square().mean(dim=2)
    return F.adaptive_avg_pool3d(squares, tuple(grid)).sqrt().flatten(1)


def mask_to_latents(mask: torch.Tensor, latent_shape: Sequence[int]) -> torch.Tensor:
    """A mask for latents `(batch, frames, 1, height, width)`: each token's value at all latents of its patch.

    `latent_shape` is `(frames, channels, height, width)`, with or without a batch before.
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
            f"`grid` must divide the latents' (frames, height, width), got {tuple(grid)} for {tuple(size)}."
        )


@torch.no_grad()
def concept_mask(
    velocity: Velocity,
    x_t: torch.Tensor,
    t: torch.Tensor,
    prompt_embeds: torch.Tensor,
    token_mask: torch.Tensor,
    *,
    anchor_embeds: torch.Tensor | None = None,
    empty_embeds: torch.Tensor | None = None,
    head_weights: torch.Tensor | None = None,
    threshold: float | None = None,
    layers: Sequence[int] | None = None,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """Where the model without its erasers sees a concept, in one pass in eval mode without gradient.

    What is given decides what the mask is made of. From the worst to the best on clips whose true region is known
    (`benchmarks/results/concept_mask_on_moving_digits.md`): attention averaged over all heads, far behind the best
    centred box; attention with `head_weights` and the velocity's difference from that of an anchor prompt
    (`velocity_mask`), about level with it; velocities with `empty_embeds` as well; and, with all three,
    `weighted_attention_mask`. It is zero where the prompt does not name the concept.

    `anchor_embeds` are the same prompts with another word for the concept, `empty_embeds` the empty prompt for every
    row; `head_weights` are those of `concept_head_weights`, `layers` and `chunk_size` as in `concept_attention`.
    """
    model = velocity.model
    grid = velocity.token_grid(x_t.shape)
    embeds = [part for part in (prompt_embeds, anchor_embeds, empty_embeds) if part is not None]
    if empty_embeds is not None and anchor_embeds is None:
        raise ValueError("`empty_embeds` must come with `anchor_embeds`, got only the former.")
    if anchor_embeds is not None and head_weights is None:
        with frozen_teacher(model):
            found = _velocities(velocity, x_t, t, embeds)
        return velocity_mask(*found[:2], token_mask, grid, *found[2:], threshold=threshold)
    tokens = torch.cat([token_mask, *[torch.zeros_like(token_mask)] * (len(embeds) - 1)])
    attention = concept_attention(model, tokens, layers=layers, head_weights=head_weights, chunk_size=chunk_size)
    with frozen_teacher(model), attention as attended:
        found = _velocities(velocity, x_t, t, embeds)
    maps = attended.maps[: len(x_t)]
    if anchor_embeds is None:
        floor = 0.0 if head_weights is None else CONCEPT_FLOOR
        return normalize_attention(maps, grid, threshold, floor=floor)
    return weighted_attention_mask(maps, *found[:2], token_mask, grid, *found[2:], threshold=threshold)


@torch.no_grad()
def concept_head_weights(
    velocity: Velocity,
    x_t: torch.Tensor,
    t: torch.Tensor,
    prompt_embeds: torch.Tensor,
    anchor_embeds: torch.Tensor,
    token_mask: torch.Tensor,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """Which heads look at a concept where it changes the velocity; no labels are needed.

    A few dozen clips at various timesteps are enough, `batch_size` of them at once; a pass has twice as many rows. See
    `concept_mask` for the other arguments. Returns `(layers, heads)` float32 that add up to 1: each head's correlation
    with the difference between the velocities of the prompts and their anchors, 0 where it is negative.
    """
    model = velocity.model
    grid = velocity.token_grid(x_t.shape)
    named = token_mask.any(dim=1).nonzero().flatten()
    if not len(named):
        raise ValueError("`token_mask` must mark the concept in some prompt, got none that has it.")
    correlations = []
    for rows in named.split(batch_size):
        tokens, rows = token_mask[rows], rows.to(x_t.device)
        attention = concept_attention(
            model, torch.cat([tokens, torch.zeros_like(tokens)]), layers=layers, keep_heads=True, chunk_size=chunk_size
        )
        with frozen_teacher(model), attention as attended:
            embeds = [prompt_embeds[rows], anchor_embeds[rows]]
            found = _velocities(velocity, x_t[rows], t[rows], embeds)
        reference = velocity_difference(*found, grid)
        correlations.append(head_correlations(attended.head_maps[: len(rows)], reference))
    return agreement_weights(torch.cat(correlations))


def _velocities(
    velocity: Velocity, x_t: torch.Tensor, t: torch.Tensor, embeds: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    # `repeat` lays whole batches one after the other, as `cat` and `chunk` do.
    count = len(embeds)
    return velocity(x_t.repeat(count, 1, 1, 1, 1), t.repeat(count), torch.cat(embeds)).chunk(count)
