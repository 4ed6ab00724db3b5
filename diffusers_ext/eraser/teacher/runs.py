"""Runs of the frozen model: which are made, the heads of their masks, and the rows that are kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from diffusers_ext.core.seeds import stream_generator, stream_seed
from diffusers_ext.eraser.concept_masks import concept_head_weights, weighted_attention_mask
from diffusers_ext.eraser.teacher.store import EMPTY_PROMPT, Row
from diffusers_ext.eraser.teacher.trajectory import (
    AttentionRequest,
    TrajectoryPoint,
    count_steps,
    frozen_teacher,
    teacher_trajectory,
)
from diffusers_ext.families.family import Velocity

_NUM_RUNS, _MOST_STEPS = 8, 4  # for the heads


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
) -> list[TrajectoryPlan]:
    """Plan the runs of one part; every prompt comes up equally often, up to one run.

    The kept steps of a run are equally spaced from a random first one: all steps are kept equally often, none twice.
    `points_per_trajectory` of each are kept, all when `None`; of these `empty_share`, in [0, 1], are for the empty
    prompt.
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
        num_empty = int(count * empty_share + rest)
        chosen = set(torch.randperm(count, generator=generator)[:num_empty].tolist())
        empty = tuple(position in chosen for position in range(count))
        run_seed = stream_seed(seed, part, index)
        plans.append(TrajectoryPlan(index, prompts[index], run_seed, steps, empty))
    return plans


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

    Everything is drawn from `seed`, and clips go through the model one by one, so that the weights, `(layers, heads)`
    float32 on the CPU, are the same whatever the batch of what they are used for. The model's erasers are off here.
    Arguments are as in `collect_teacher_samples`; a run has at most 4 of the `num_inference_steps`.

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


class RunSettings(NamedTuple):
    """Of every run."""

    latent_shape: tuple[int, ...]
    num_inference_steps: int
    guidance_scale: float
    mask_threshold: float | None


class SamplePart(NamedTuple):
    """What is run for one part of the samples."""

    name: str
    prompts: torch.Tensor  # (prompts, text, dim)
    others: torch.Tensor  # the same shape: anchors, or the empty prompt again and again
    token_mask: torch.Tensor | None  # (prompts, text) bool
    plans: list[TrajectoryPlan]
    head_weights: torch.Tensor | None = None  # needed with a token mask


class TeacherRuns:
    """Makes batches of runs; `empty_embed` `(text, dim)` is the negative prompt of the guidance."""

    def __init__(
        self, velocity: Velocity, scheduler: SchedulerMixin, settings: RunSettings, empty_embed: torch.Tensor
    ) -> None:
        self.velocity, self.scheduler, self.settings = velocity, scheduler, settings
        self.device = velocity.model.device
        self.empty_embed = empty_embed.to(self.device)

    def calibrate_heads(self, part: SamplePart, seed: int, show_progress: bool) -> torch.Tensor:
        """The `head_weights` of a part, `(layers, heads)`; see `calibrate_heads`."""
        return calibrate_heads(
            self.velocity,
            self.scheduler,
            part.prompts,
            part.others,
            self.empty_embed,
            part.token_mask,
            latent_shape=self.settings.latent_shape,
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=self.settings.guidance_scale,
            seed=seed,
            show_progress=show_progress,
        )

    def make(self, part: SamplePart, plans: Sequence[TrajectoryPlan]) -> list[Row]:
        """Runs as one batch: the rows of each, `{name: (points, ...)}` on the CPU."""
        settings, chosen = self.settings, torch.tensor([plan.prompt for plan in plans])
        prompts, others = (texts[chosen.to(texts.device)].to(self.device) for texts in (part.prompts, part.others))
        kept, other_at = self._points(part.name, plans, others)
        attention = None
        if part.token_mask is not None:
            tokens = part.token_mask.cpu()[chosen]
            attention = AttentionRequest(tokens, kept, part.head_weights)
        generators = [torch.Generator().manual_seed(plan.seed) for plan in plans]
        points = teacher_trajectory(
            self.velocity,
            self.scheduler,
            randn_tensor(
                (len(plans), *settings.latent_shape),
                generator=generators,
                device=self.device,
                dtype=part.prompts.dtype,
            ),
            prompts,
            self.empty_embed.to(prompts.dtype).expand_as(prompts),
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generators=generators,
            extra_prompt_embeds=others,
            extra_at=other_at,
            attention=attention,
        )
        rows: list[list[Row]] = [[] for _ in plans]
        last = int(kept.any(1).nonzero().max())
        for step, point in zip(range(last + 1), points):
            velocities = _other_velocities(point, other_at[step])
            masks = self._masks(attention, point, velocities)
            for i in kept[step].nonzero().flatten().tolist():
                rows[i].append(_row(part.name, plans[i], len(rows[i]), point, velocities, masks, i))
        return [{name: torch.stack([r[name] for r in run]) for name in run[0]} for run in rows]

    def _points(
        self, part: str, plans: Sequence[TrajectoryPlan], others: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(steps, batch)` bool: points that are kept, and those where the other prompt has to be run."""
        num_steps = count_steps(self.scheduler, self.settings.num_inference_steps)
        kept = torch.zeros(num_steps, len(plans), dtype=torch.bool)
        other_at = torch.zeros_like(kept)
        for i, plan in enumerate(plans):
            kept[list(plan.steps), i] = True
            # The guidance runs the empty prompt in any case.
            if self.settings.guidance_scale <= 1 or not torch.equal(others[i], self.empty_embed):
                needed = plan.empty if part == "preserved" else (True,) * len(plan.steps)
                other_at[list(plan.steps), i] = torch.tensor(needed)
        return kept, other_at

    def _masks(
        self, request: AttentionRequest | None, point: TrajectoryPoint, others: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`(batch, frames', rows, columns)`, of use where a row is kept."""
        if point.attention is None:
            return None
        return weighted_attention_mask(
            point.attention,
            point.velocity,
            others,
            request.token_mask,
            self.velocity.token_grid(point.x_t.shape),
            point.negative,
            threshold=self.settings.mask_threshold,
        )


def _other_velocities(point: TrajectoryPoint, other_at: torch.Tensor) -> torch.Tensor | None:
    """`(batch, ...)` velocities of the other prompt; the empty prompt's where it was not run."""
    if point.extra is None:
        return point.negative
    others = torch.zeros_like(point.velocity) if point.negative is None else point.negative.clone()
    others[other_at.to(others.device)] = point.extra
    return others


def _row(
    part: str,
    plan: TrajectoryPlan,
    position: int,
    point: TrajectoryPoint,
    others: torch.Tensor | None,
    masks: torch.Tensor | None,
    i: int,
) -> Row:
    """What is kept of run `i` at a point, its `position`-th."""
    row = {"x_t": point.x_t[i], "t": point.t[i]}
    if part == "target":
        row |= {"prompt": torch.tensor(plan.prompt)}
        row |= {"v_concept": point.velocity[i], "v_anchor": others[i]}
        if masks is not None:
            row["mask"] = masks[i]
    elif plan.empty[position]:
        row |= {"prompt": torch.tensor(EMPTY_PROMPT), "velocity": others[i]}
    else:
        row |= {"prompt": torch.tensor(plan.prompt), "velocity": point.velocity[i]}
    return {name: value.cpu() for name, value in row.items()}
