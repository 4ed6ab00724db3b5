"""Which heads masks of a concept are read from: found once, on a few short runs of the frozen model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from diffusers_ext.eraser.concept_mask import concept_head_weights
from diffusers_ext.eraser.teacher_trajectory import (
    count_steps,
    frozen_teacher,
    teacher_trajectory,
)
from diffusers_ext.eraser.trajectory_plan import plan_trajectories
from diffusers_ext.families.velocity import Velocity


_NUM_RUNS, _MOST_STEPS = 8, 4


def calibrate_heads(
    velocity: Velocity,
    scheduler: SchedulerMixin,
    target_embeds: torch.Tensor,
    anchor_embeds: torch.Tensor,
    empty_embed: torch.Tensor,
    token_mask: torch.Tensor,
    *,
    latent_shape: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    seed: int = 0,
    show_progress: bool = True,
) -> torch.Tensor:
    """`concept_head_weights` at all points of a few short runs, of prompts that name the concept.

    Everything is drawn from `seed`, and clips go through the model one by one, so that the weights
    are the same whatever the batch of what they are used for. The model's erasers are off here.

    Args:
        target_embeds, anchor_embeds: `(target prompts, text, dim)`; the dtype is that of the latents.
        empty_embed: `(text, dim)`, the negative prompt of the guidance.
        token_mask: `(target prompts, text)` bool, the concept's tokens.
        latent_shape: `(frames, channels, height, width)`.
        num_inference_steps: of a run, at most 4 of which are made.

    Returns:
        `(layers, heads)` float32 on the CPU.

    Raises:
        ValueError: no prompt names the concept, or it makes no difference to the model.
    """
    named = token_mask.any(dim=1).nonzero().flatten().tolist()
    if not named:
        raise ValueError("`token_mask` must mark the concept in some prompt, got none that has it.")
    device, steps = velocity.model.device, min(num_inference_steps, _MOST_STEPS)
    num_steps = count_steps(scheduler, steps)
    options = {"points_per_trajectory": None, "empty_share": 0.0, "seed": seed}
    plans = plan_trajectories("heads", _NUM_RUNS, len(named), num_steps, **options)
    x_t, t, prompts = [], [], []
    for plan in tqdm(plans, desc="runs for the heads", disable=not show_progress):
        generator, prompt = torch.Generator().manual_seed(plan.seed), named[plan.prompt]
        embeds = target_embeds[[prompt]].to(device)
        points = teacher_trajectory(
            velocity,
            scheduler,
            randn_tensor((1, *latent_shape), generator, device, embeds.dtype),
            embeds,
            empty_embed.to(embeds).expand_as(embeds),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generators=[generator],
        )
        for point in points:
            x_t.append(point.x_t)
            t.append(point.t)
            prompts.append(prompt)
    texts = (embeds[prompts].to(device) for embeds in (target_embeds, anchor_embeds))
    states = (torch.cat(x_t), torch.cat(t), *texts, token_mask.cpu()[prompts])
    with frozen_teacher(velocity.model):
        return concept_head_weights(velocity, *states, batch_size=1).cpu()
