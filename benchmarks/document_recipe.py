"""The eraser's training step as its first published description has it, for comparison with this project's.

Seven forward passes a step, six of them with a graph, and two whole models; the negative target comes from the model
that trains, clean latents are random numbers, the unconditional prompt is "not <concept>", the mask is read at
timestep 0, and localisation is a plain sum. Nothing of the library trains this way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusers_ext.eraser.adapter.outputs import eraser_outputs
from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.families.family import Family, Velocity


@dataclass(frozen=True)
class DocumentTexts:
    """Text of one run, each `(1, tokens, dim)`; `token_mask` `(1, tokens)` marks the concept in `target`."""

    target: torch.Tensor
    negative: torch.Tensor  # of "not <concept>"
    preserved: torch.Tensor
    token_mask: torch.Tensor


@dataclass(frozen=True)
class DocumentRecipe:
    """Weights of the three losses and the guidance scale, with the description's defaults."""

    guidance_scale: float = 7.5
    unlearning_weight: float = 1.0
    preservation_weight: float = 0.5
    localization_weight: float = 1.0


def _mask(student: Velocity, x_t: torch.Tensor, text: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """Attention to the concept, `(batch, tokens, 1)` in [0, 1]; each clip's own range."""
    with concept_attention(student.transformer, token_mask) as attention:
        student(x_t, torch.zeros(len(x_t), dtype=torch.long, device=x_t.device), text)
    maps = attention.maps.detach()
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    return ((maps - low) / (high - low + 1e-6))[..., None]


def document_loss(
    original: Velocity,
    student: Velocity,
    texts: DocumentTexts,
    x_t: torch.Tensor,
    t: torch.Tensor,
    to_latents: Callable[[torch.Tensor], torch.Tensor],
    recipe: DocumentRecipe,
) -> torch.Tensor:
    """The loss of one step, scalar.

    Args:
        original: the untouched second model.
        student: the model whose eraser trains.
        texts: conditions; repeated over the batch.
        x_t: `(batch, frames, channels, height, width)`.
        t: `(batch,)` int64.
        to_latents: a token mask `(batch, tokens, 1)` as one of latents, broadcastable to `x_t`.
        recipe: weights.
    """
    count = len(x_t)
    target, negative, preserved = (
        text.expand(count, -1, -1) for text in (texts.target, texts.negative, texts.preserved)
    )
    mask = _mask(student, x_t, target, texts.token_mask.expand(count, -1))
    with eraser_outputs(student.transformer) as outputs:
        student(x_t, t, target)
    predicted = student(x_t, t, target)
    v_concept, v_uncond = student(x_t, t, target), student(x_t, t, negative)
    v_negative = v_uncond + recipe.guidance_scale * (v_uncond - v_concept)
    spatial = to_latents(mask)
    unlearning = ((predicted - v_negative) ** 2 * spatial).mean()
    with torch.no_grad():
        v_original = original(x_t, t, preserved)
    preservation = ((student(x_t, t, preserved) - v_original) ** 2 * spatial).mean()
    sums = [((output * (1 - mask)) ** 2).sum(dim=(1, 2)).mean() for output in outputs.values()]
    return (
        recipe.unlearning_weight * unlearning
        + recipe.preservation_weight * preservation
        + recipe.localization_weight * torch.stack(sums).mean()
    )


def noised_randomness(
    family: Family, scheduler: object, shape: tuple[int, ...], t: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Random "clean" latents with random noise at `t`, as the scheduler of a family mixes them."""
    clean, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    signal, sigma = family.level(scheduler, t, clean)
    return signal * clean + sigma * noise
