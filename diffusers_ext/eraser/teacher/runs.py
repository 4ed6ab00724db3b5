"""Denoising runs of the frozen model: which are made, and the rows that are kept of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from diffusers_ext.core.seeds import stream_generator, stream_seed
from diffusers_ext.eraser.adapter.outputs import frozen_teacher
from diffusers_ext.eraser.concept_masks import concept_head_weights, weighted_attention_mask
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.teacher.store import EMPTY_PROMPT, Row
from diffusers_ext.eraser.teacher.trajectory import (
    AttentionRequest,
    TrajectoryPoint,
    guides,
    run_timesteps,
    served_steps,
    teacher_trajectory,
)
from diffusers_ext.families.family import Velocity
from diffusers_ext.families.text_conditioning import Text, repeat_text, same_text, token_embeds

_NUM_RUNS, _MOST_STEPS = 8, 4  # for the heads


class EraserText(NamedTuple):
    """Embeddings of all prompts, each `(prompts, text, dim)`; the empty prompt's is `(text, dim)`.

    Where text is more than one tensor they are `TextConditioning`, the empty prompt's of one row.
    """

    target: Text
    anchor: Text
    preserved: Text
    empty: Text


class TrajectoryPlan(NamedTuple):
    """One run of one part of the samples."""

    index: int  # in its part
    prompt: int  # index of its prompt
    seed: int  # of its noise
    steps: tuple[int, ...]  # whose points are kept, ascending
    empty: tuple[bool, ...]  # points at which the empty prompt's velocity stands for the prompt's


def plan_trajectories(
    part: str,
    num_trajectories: int,
    num_prompts: int,
    num_steps: int,
    *,
    points_per_trajectory: int | None,
    empty_share: float,
    seed: int,
    served: Sequence[int] | None = None,
) -> list[TrajectoryPlan]:
    """Plan the runs of one part; every prompt comes up equally often, up to one run.

    The kept steps of a run are equally spaced from a random first one: all steps are kept equally often, none twice.
    `empty_share`, in [0, 1], of them are for the empty prompt. Of `num_steps` that can be kept, `served` says which
    of a run they are, where they are not all.
    """
    prompts: list[int] = []
    while len(prompts) < num_trajectories:
        generator = stream_generator(seed, f"{part} prompts", len(prompts))
        prompts += torch.randperm(num_prompts, generator=generator).tolist()
    count = num_steps if points_per_trajectory is None else points_per_trajectory
    plans = []
    for index in range(num_trajectories):
        generator = stream_generator(seed, f"{part} points", index)
        start, rest = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        steps = tuple(int((position + start) * num_steps / count) for position in range(count))
        steps = steps if served is None else tuple(served[step] for step in steps)
        num_empty = int(count * empty_share + rest)
        chosen = set(torch.randperm(count, generator=generator)[:num_empty].tolist())
        empty = tuple(position in chosen for position in range(count))
        run_seed = stream_seed(seed, part, index)
        plans.append(TrajectoryPlan(index, prompts[index], run_seed, steps, empty))
    return plans


def _from_noise(
    velocity: Velocity,
    scheduler: SchedulerMixin,
    prompt_embeds: Text,
    empty_embed: Text,
    generators: list[torch.Generator],
    latent_shape: Sequence[int],
    **options: Any,
) -> Iterator[TrajectoryPoint]:
    """`teacher_trajectory` from each generator's noise, guided away from the empty prompt."""
    shape, tokens = (len(prompt_embeds), *velocity.state_shape(latent_shape)), token_embeds(prompt_embeds)
    noise = randn_tensor(shape, generators, tokens.device, velocity.latents_dtype or tokens.dtype)
    negative = repeat_text(empty_embed.to(tokens.device, tokens.dtype), len(prompt_embeds))
    return teacher_trajectory(velocity, scheduler, noise, prompt_embeds, negative, generators=generators, **options)


def calibrate_heads(
    velocity: Velocity,
    scheduler: SchedulerMixin,
    text: EraserText,
    token_mask: torch.Tensor,
    recipe: EraserTraining,
    latent_shape: Sequence[int],
    *,
    show_progress: bool = True,
) -> torch.Tensor:
    """`concept_head_weights` at all points of a few runs of at most 4 steps, of prompts that name the concept.

    Everything is drawn from the recipe's seed, and clips go through the model one by one, so that the weights,
    `(layers, heads)` float32 on the CPU, are the same whatever the batch of what they are used for.
    """
    named = token_mask.any(dim=1).nonzero().flatten().tolist()
    if not named:
        raise ValueError("`token_mask` must mark the concept in some prompt, got none that has it.")
    device, steps = velocity.model.device, min(recipe.num_inference_steps, _MOST_STEPS)
    served = served_steps(velocity, scheduler, steps, latent_shape)
    num_steps = served[-1] + 1
    options = {"points_per_trajectory": None, "empty_share": 0.0, "seed": recipe.seed}
    plans = plan_trajectories("heads", _NUM_RUNS, len(named), num_steps, **options)
    x_t, t, prompts = [], [], []
    for plan in tqdm(plans, desc="runs for the heads", disable=not show_progress):
        generator, prompt = torch.Generator().manual_seed(plan.seed), named[plan.prompt]
        points = _from_noise(
            velocity,
            scheduler,
            text.target[[prompt]].to(device),
            text.empty,
            [generator],
            latent_shape,
            num_inference_steps=steps,
            guidance_scale=recipe.sampling_guidance_scale,
            numbers=[plan.index],
        )
        for step, point in zip(range(num_steps), points):
            if step in served:
                x_t.append(point.x_t)
                t.append(point.t)
                prompts.append(prompt)
    texts = (embeds[prompts].to(device) for embeds in (text.target, text.anchor))
    states = (torch.cat(x_t), torch.cat(t), *texts, token_mask.cpu()[prompts])
    with frozen_teacher(*velocity.models):
        return concept_head_weights(velocity, *states, batch_size=1).cpu()


class SamplePart(NamedTuple):
    """What is run for one part of the samples."""

    name: str
    prompts: Text  # (prompts, text, dim)
    others: Text  # the same shape: anchors, or the empty prompt again and again
    token_mask: torch.Tensor | None  # (prompts, text) bool
    plans: list[TrajectoryPlan]
    head_weights: torch.Tensor | None = None  # needed with a token mask


class TeacherRuns:
    """Makes batches of runs, guided away from the empty prompt, as the recipe says."""

    def __init__(
        self,
        velocity: Velocity,
        scheduler: SchedulerMixin,
        empty_embed: Text,
        recipe: EraserTraining,
        latent_shape: Sequence[int],
    ) -> None:
        self.velocity, self.scheduler, self.recipe = velocity, scheduler, recipe
        self.latent_shape, self.device = latent_shape, velocity.model.device
        self.empty_embed = empty_embed.to(self.device)

    def make(self, part: SamplePart, plans: Sequence[TrajectoryPlan]) -> list[Row]:
        """Runs as one batch: the rows of each, `{name: (points, ...)}` on the CPU."""
        chosen = torch.tensor([plan.prompt for plan in plans])
        prompts, extra = (
            texts[chosen.to(token_embeds(texts).device)].to(self.device) for texts in (part.prompts, part.others)
        )
        kept, other_at = self._points(part.name, plans, extra)
        attention = None
        if part.token_mask is not None:
            tokens = part.token_mask.cpu()[chosen]
            attention = AttentionRequest(tokens, kept, part.head_weights)
        generators = [torch.Generator().manual_seed(plan.seed) for plan in plans]
        points = _from_noise(
            self.velocity,
            self.scheduler,
            prompts,
            self.empty_embed,
            generators,
            self.latent_shape,
            num_inference_steps=self.recipe.num_inference_steps,
            guidance_scale=self.recipe.sampling_guidance_scale,
            extra_prompt_embeds=extra,
            extra_at=other_at,
            attention=attention,
            numbers=[plan.index for plan in plans],
        )
        rows: list[list[Row]] = [[] for _ in plans]
        last = int(kept.any(1).nonzero().max())
        for step, point in zip(range(last + 1), points):
            others, masks = _other_velocities(point, other_at[step]), None
            if point.attention is not None:
                grid = self.velocity.token_grid(point.x_t.shape)
                found = (point.attention, point.velocity, others, attention.token_mask, grid, point.negative)
                masks = weighted_attention_mask(*found, threshold=self.recipe.mask_threshold)
            for i in kept[step].nonzero().flatten().tolist():
                row = {"x_t": point.x_t[i], "t": point.t[i], "prompt": torch.tensor(plans[i].prompt)}
                if part.name == "target":
                    row |= {"v_concept": point.velocity[i], "v_anchor": others[i]}
                    row |= {} if masks is None else {"mask": masks[i]}
                elif plans[i].empty[len(rows[i])]:
                    row |= {"prompt": torch.tensor(EMPTY_PROMPT), "velocity": others[i]}
                else:
                    row |= {"velocity": point.velocity[i]}
                rows[i].append({name: value.cpu() for name, value in row.items()})
        return [{name: torch.stack([r[name] for r in run]) for name in run[0]} for run in rows]

    def _points(self, part: str, plans: Sequence[TrajectoryPlan], others: Text) -> tuple[torch.Tensor, torch.Tensor]:
        """`(steps, batch)` bool: points that are kept, and those where the other prompt has to be run."""
        num_steps = len(
            run_timesteps(self.velocity, self.scheduler, self.recipe.num_inference_steps, self.latent_shape)
        )
        kept = torch.zeros(num_steps, len(plans), dtype=torch.bool)
        other_at = torch.zeros_like(kept)
        for i, plan in enumerate(plans):
            kept[list(plan.steps), i] = True
            # The guidance runs the empty prompt in any case.
            other = others[i] if isinstance(others, torch.Tensor) else others[[i]]
            guided = guides(self.velocity, self.recipe.sampling_guidance_scale)
            if not guided or not same_text(other, self.empty_embed):
                needed = plan.empty if part == "preserved" else (True,) * len(plan.steps)
                other_at[list(plan.steps), i] = torch.tensor(needed)
        return kept, other_at


def _other_velocities(point: TrajectoryPoint, other_at: torch.Tensor) -> torch.Tensor | None:
    """`(batch, ...)` velocities of the other prompt; the empty prompt's where it was not run."""
    if point.extra is None:
        return point.negative
    others = torch.zeros_like(point.velocity) if point.negative is None else point.negative.clone()
    others[other_at.to(others.device)] = point.extra
    return others
