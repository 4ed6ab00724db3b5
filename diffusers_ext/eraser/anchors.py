"""Which other concept the frozen model could draw with the least change: a place for erased prompts to go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import SchedulerMixin

from diffusers_ext.core.seeds import stream_generator
from diffusers_ext.eraser.teacher_trajectory import frozen_teacher, teacher_trajectory
from diffusers_ext.families.velocity import Velocity


@torch.no_grad()
def anchor_distances(
    velocity: Velocity,
    scheduler: SchedulerMixin,
    target_embeds: torch.Tensor,
    candidate_embeds: torch.Tensor,
    empty_embed: torch.Tensor,
    *,
    latent_shape: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    seed: int = 0,
) -> torch.Tensor:
    """How far each candidate's velocities lie from the concept's, along runs towards the concept.

    `mean over runs and steps of ||v(x_t, candidate) - v(x_t, concept)||^2 / ||v(x_t, concept)||^2`.
    A neutral word is no safe anchor: what the model draws for it may be the very concept that is
    erased, and guidance cannot sharpen a word that fits everything. The model is asked without its
    erasers, in eval mode, on a copy of the scheduler.

    Args:
        target_embeds: `(prompts, text, dim)`, one run each.
        candidate_embeds: `(candidates, prompts, text, dim)`, the same prompts with each candidate in
            the place of the concept.
        empty_embed: `(text, dim)`, the empty prompt of the guidance.
        latent_shape: `(frames, channels, height, width)`.
        num_inference_steps, guidance_scale, seed: of the runs and their noises.

    Returns:
        `(candidates,)` float32 on the CPU.

    Raises:
        ValueError: no candidate, or prompts that do not correspond.
    """
    if not len(candidate_embeds) or candidate_embeds.shape[1:] != target_embeds.shape:
        raise ValueError(
            f"`candidate_embeds` must be (candidates, {', '.join(map(str, target_embeds.shape))}) with "
            f"at least one candidate, got {tuple(candidate_embeds.shape)}."
        )
    generators = [stream_generator(seed, "anchor", index) for index in range(len(target_embeds))]
    noises = [torch.randn(*latent_shape, generator=generator) for generator in generators]
    points = teacher_trajectory(
        velocity,
        scheduler,
        torch.stack(noises).to(target_embeds.device, target_embeds.dtype),
        target_embeds,
        empty_embed.expand_as(target_embeds),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generators=generators,
    )
    total, steps = torch.zeros(len(candidate_embeds)), 0
    for point in points:
        concept, steps = point.velocity.float(), steps + 1
        norms = concept.flatten(1).square().sum(1)
        for index, embeds in enumerate(candidate_embeds):
            with frozen_teacher(velocity.model):
                other = velocity(point.x_t, point.t, embeds)
            distances = (other - concept).flatten(1).square().sum(1)
            total[index] += (distances / norms).mean().cpu()
    return total / steps
