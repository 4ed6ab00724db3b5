"""Where a concept is in a clip: masks from attention to its tokens and from what it does to velocities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusers_ext.eraser.attention_mass import agreement_weights, head_correlations
from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.eraser.masks import (
    CONCEPT_FLOOR,
    normalize_attention,
    velocity_difference,
    velocity_mask,
    weighted_attention_mask,
)
from diffusers_ext.eraser.teacher_trajectory import frozen_teacher
from diffusers_ext.families.velocity import Velocity


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

    What is given decides what the mask is made of. From the worst to the best on clips whose true
    region is known (`benchmarks/results/concept_mask_on_moving_digits.md`): attention averaged over all
    heads, far behind the best centred box; attention with `head_weights` and the velocity's difference
    from that of an anchor prompt (`velocity_mask`), about level with it; velocities with
    `empty_embeds` as well; and, with all three, `weighted_attention_mask`.

    Args:
        velocity: of the clip's size.
        x_t: `(batch, frames, channels, height, width)` noisy latents.
        t: `(batch,)` timesteps.
        prompt_embeds: `(batch, text, text_dim)`.
        token_mask: `(batch, text)` bool, true at the concept's tokens.
        anchor_embeds: the same prompts with another word for the concept.
        empty_embeds: the empty prompt, for every row; used with `anchor_embeds`.
        head_weights: `(layers, heads)` from `concept_head_weights`.
        threshold: in (0, 1] for masks of zeros and ones; soft masks when `None`.
        layers: indices of transformer blocks; all when `None`.
        chunk_size: see `attention_mass`.

    Returns:
        `(batch, frames', rows, columns)` float32 in [0, 1] on the grid of video tokens; zero where
        the prompt does not name the concept.
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
    attention = concept_attention(
        model, tokens, layers=layers, head_weights=head_weights, chunk_size=chunk_size
    )
    with frozen_teacher(model), attention as attended:
        found = _velocities(velocity, x_t, t, embeds)
    maps = attended.maps[: len(x_t)]
    if anchor_embeds is None:
        floor = 0.0 if head_weights is None else CONCEPT_FLOOR
        return normalize_attention(maps, grid, threshold, floor=floor)
    return weighted_attention_mask(
        maps, *found[:2], token_mask, grid, *found[2:], threshold=threshold
    )


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

    A few dozen clips at various timesteps are enough, `batch_size` of them at once; a pass has twice
    as many rows. See `concept_mask` for the other arguments.

    Returns:
        `(layers, heads)` float32 that add up to 1: each head's correlation with the difference
        between the velocities of the prompts and their anchors, 0 where it is negative.

    Raises:
        ValueError: no prompt names the concept, or no head agrees with the velocities.
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
            model,
            torch.cat([tokens, torch.zeros_like(tokens)]),
            layers=layers,
            keep_heads=True,
            chunk_size=chunk_size,
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
    count = len(embeds)
    return velocity(x_t.repeat(count, 1, 1, 1, 1), t.repeat(count), torch.cat(embeds)).chunk(count)
