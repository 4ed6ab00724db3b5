"""Denoising runs of the frozen model: how they go, which are made, and the rows that are kept of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from diffusers_ext.core.seeds import check_diffusion_levels, stream_generator, stream_seed
from diffusers_ext.eraser.adapter.outputs import frozen_teacher
from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.eraser.concept_masks import concept_head_weights, weighted_attention_mask
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.teacher.store import EMPTY_PROMPT, Row
from diffusers_ext.families.family import Velocity

_NUM_RUNS, _MOST_STEPS = 8, 4  # for the heads


class EraserText(NamedTuple):
    """Embeddings of all prompts, each `(prompts, text, dim)`; the empty prompt's is `(text, dim)`."""

    target: torch.Tensor
    anchor: torch.Tensor
    preserved: torch.Tensor
    empty: torch.Tensor


class AttentionRequest(NamedTuple):
    """Where the concept's attention is read along a run."""

    token_mask: torch.Tensor  # (batch, text) bool, the concept's tokens
    at: torch.Tensor  # (steps, batch) bool
    head_weights: torch.Tensor  # (layers, heads)


class TrajectoryPoint(NamedTuple):
    """One step of a batch of runs; velocities are float32."""

    x_t: torch.Tensor  # (batch, frames, channels, height, width), what the model reads
    t: torch.Tensor  # (batch,) int64
    velocity: torch.Tensor  # of the prompts
    negative: torch.Tensor | None  # of the negative prompts; `None` without guidance
    extra: torch.Tensor | None  # (chosen rows, ...), of the extra prompts
    attention: torch.Tensor | None  # (batch, video) weighted heads, zero where not asked for
    x_next: torch.Tensor  # the latents after the step


def teacher_trajectory(
    velocity: Velocity,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    generators: Sequence[torch.Generator] | None = None,
    extra_prompt_embeds: torch.Tensor | None = None,
    extra_at: torch.Tensor | None = None,
    attention: AttentionRequest | None = None,
) -> Iterator[TrajectoryPoint]:
    """Sample with classifier-free guidance, as `CogVideoXPipeline` does, and give every step.

    The guided velocity is `v(empty) + w (v(prompt) - v(empty))` (https://arxiv.org/abs/2207.12598, equation 6, with w
    = `guidance_scale`). Each step is one batched pass over the rows of all prompts. The model's erasers are off in it;
    nothing of the model stays changed between two steps.

    Args:
        scheduler: predicts velocities; a copy is used.
        latents: `(batch, frames, channels, height, width)` normal noise; its dtype is that of the run.
        prompt_embeds, negative_prompt_embeds: `(batch, text, dim)`; the latter are not read with a `guidance_scale` of
            1 or less.
        generators: one per row, for schedulers that draw noise in each step.
        extra_prompt_embeds: a further prompt per row, with a velocity but without a part in the guidance.
        extra_at: `(steps, batch)` bool, where that velocity is wanted; everywhere when `None`.
    """
    texts = (prompt_embeds, negative_prompt_embeds, extra_prompt_embeds)
    shapes = [tuple(text.shape) for text in texts if text is not None]
    if latents.ndim != 5 or len(set(shapes)) > 1 or shapes[0][:1] != latents.shape[:1]:
        raise ValueError(
            "`latents` must be (batch, frames, channels, height, width), with one row of embeddings "
            f"of one shape each, got {tuple(latents.shape)} and {shapes}."
        )
    check_predicts_velocity(scheduler)
    run = _Run(scheduler, num_inference_steps, latents, generators)
    if extra_prompt_embeds is not None and extra_at is None:
        extra_at = torch.ones(len(run.timesteps), len(latents), dtype=torch.bool)
    return _walk(velocity, run, texts, guidance_scale, extra_at, attention)


def check_predicts_velocity(scheduler: SchedulerMixin) -> None:
    """Raise `ValueError` where a scheduler reads the model's output as anything but a velocity."""
    kind = scheduler.config.get("prediction_type")
    if kind != "v_prediction":
        raise ValueError(
            f"`scheduler` must have the prediction type 'v_prediction', got {kind!r} in a "
            f"{type(scheduler).__name__}. Use the scheduler that comes with the model."
        )
    check_diffusion_levels(scheduler)


def count_steps(scheduler: SchedulerMixin, num_inference_steps: int) -> int:
    """How many steps a run of a scheduler has; the scheduler is left as it is."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    return len(scheduler.timesteps)


@torch.no_grad()
def _walk(
    velocity: Velocity,
    run: _Run,
    texts: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    guidance_scale: float,
    extra_at: torch.Tensor | None,
    attention: AttentionRequest | None,
) -> Iterator[TrajectoryPoint]:
    prompt, negative, extra = texts
    guided, batch = guidance_scale > 1, len(prompt)
    before = batch if guided else 0
    for step, timestep in enumerate(run.timesteps):
        x_t = run.scheduler.scale_model_input(run.latents, timestep)
        # The batch of a pass: empty prompts where guidance needs them, prompts, chosen extra ones.
        rows, embeds = ([x_t, x_t], [negative, prompt]) if guided else ([x_t], [prompt])
        if extra is not None and extra_at[step].any():
            chosen = extra_at[step].to(x_t.device)
            rows, embeds = [*rows, x_t[chosen]], [*embeds, extra[chosen]]
        rows, embeds = torch.cat(rows), torch.cat(embeds)
        asked = (rows, timestep.expand(len(rows)), embeds)
        maps = None
        with frozen_teacher(velocity.model):
            if attention is None or not attention.at[step].any():
                found = velocity(*asked)
            else:
                prompts = slice(before, before + batch)
                tokens = torch.zeros(embeds.shape[:2], dtype=torch.bool)
                tokens[prompts] = attention.token_mask.cpu() & attention.at[step].cpu()[:, None]
                with concept_attention(velocity.model, tokens, head_weights=attention.head_weights) as attended:
                    found = velocity(*asked)
                maps = attended.maps[prompts]
        unconditional = found[:before] if guided else None
        conditional, others = found[before : before + batch], found[before + batch :]
        guidance = conditional
        if guided:
            guidance = unconditional + guidance_scale * (conditional - unconditional)
        run.advance(step, guidance)
        times = timestep.expand(batch).to(torch.int64)
        found = (conditional, unconditional, others if len(others) else None)
        yield TrajectoryPoint(x_t, times, *found, maps, run.latents)


class _Run:
    """The state of a batch of runs: its own scheduler, and the latents."""

    def __init__(
        self,
        scheduler: SchedulerMixin,
        num_inference_steps: int,
        latents: torch.Tensor,
        generators: Sequence[torch.Generator] | None,
    ) -> None:
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        self.timesteps = self.scheduler.timesteps
        self.latents = latents * self.scheduler.init_noise_sigma
        accepted = inspect.signature(self.scheduler.step).parameters
        self._arguments: dict[str, Any] = {"return_dict": False}
        if "generator" in accepted and generators is not None:
            self._arguments["generator"] = list(generators)
        self._two_step = "old_pred_original_sample" in accepted
        self._last_clean: torch.Tensor | None = None

    def advance(self, step: int, guided: torch.Tensor) -> None:
        """One step of the scheduler; CogVideoX's DPM-Solver++ needs the last clean prediction."""
        timestep, dtype = self.timesteps[step], self.latents.dtype
        if self._two_step:
            last = self.timesteps[step - 1] if step else None
            latents, self._last_clean = self.scheduler.step(
                guided, self._last_clean, timestep, last, self.latents, **self._arguments
            )
        else:
            latents = self.scheduler.step(guided, timestep, self.latents, **self._arguments)[0]
        self.latents = latents.to(dtype)


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
    `empty_share`, in [0, 1], of them are for the empty prompt.
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


def _from_noise(
    velocity: Velocity,
    scheduler: SchedulerMixin,
    prompt_embeds: torch.Tensor,
    empty_embed: torch.Tensor,
    generators: list[torch.Generator],
    latent_shape: Sequence[int],
    **options: Any,
) -> Iterator[TrajectoryPoint]:
    """`teacher_trajectory` from each generator's noise, guided away from the empty prompt."""
    shape, device, dtype = (len(prompt_embeds), *latent_shape), prompt_embeds.device, prompt_embeds.dtype
    noise = randn_tensor(shape, generators, device, dtype)
    negative = empty_embed.to(prompt_embeds).expand_as(prompt_embeds)
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
    num_steps = count_steps(scheduler, steps)
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
        )
        for point in points:
            x_t.append(point.x_t)
            t.append(point.t)
            prompts.append(prompt)
    texts = (embeds[prompts].to(device) for embeds in (text.target, text.anchor))
    states = (torch.cat(x_t), torch.cat(t), *texts, token_mask.cpu()[prompts])
    with frozen_teacher(velocity.model):
        return concept_head_weights(velocity, *states, batch_size=1).cpu()


class SamplePart(NamedTuple):
    """What is run for one part of the samples."""

    name: str
    prompts: torch.Tensor  # (prompts, text, dim)
    others: torch.Tensor  # the same shape: anchors, or the empty prompt again and again
    token_mask: torch.Tensor | None  # (prompts, text) bool
    plans: list[TrajectoryPlan]
    head_weights: torch.Tensor | None = None  # needed with a token mask


class TeacherRuns:
    """Makes batches of runs, guided away from the empty prompt, as the recipe says."""

    def __init__(
        self,
        velocity: Velocity,
        scheduler: SchedulerMixin,
        empty_embed: torch.Tensor,
        recipe: EraserTraining,
        latent_shape: Sequence[int],
    ) -> None:
        self.velocity, self.scheduler, self.recipe = velocity, scheduler, recipe
        self.latent_shape, self.device = latent_shape, velocity.model.device
        self.empty_embed = empty_embed.to(self.device)

    def make(self, part: SamplePart, plans: Sequence[TrajectoryPlan]) -> list[Row]:
        """Runs as one batch: the rows of each, `{name: (points, ...)}` on the CPU."""
        chosen = torch.tensor([plan.prompt for plan in plans])
        prompts, extra = (texts[chosen.to(texts.device)].to(self.device) for texts in (part.prompts, part.others))
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

    def _points(
        self, part: str, plans: Sequence[TrajectoryPlan], others: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(steps, batch)` bool: points that are kept, and those where the other prompt has to be run."""
        num_steps = count_steps(self.scheduler, self.recipe.num_inference_steps)
        kept = torch.zeros(num_steps, len(plans), dtype=torch.bool)
        other_at = torch.zeros_like(kept)
        for i, plan in enumerate(plans):
            kept[list(plan.steps), i] = True
            # The guidance runs the empty prompt in any case.
            if self.recipe.sampling_guidance_scale <= 1 or not torch.equal(others[i], self.empty_embed):
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
