"""Sampling with the frozen model as its pipeline samples, step by step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin

from diffusers_ext.core.restored_state import module_eval_mode
from diffusers_ext.core.seeds import check_diffusion_levels, check_flow_levels
from diffusers_ext.eraser.adapter.outputs import frozen_teacher
from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.families.family import Velocity
from diffusers_ext.families.text_conditioning import Text, join_texts, token_embeds


class AttentionRequest(NamedTuple):
    """Where the concept's attention is read along a run."""

    token_mask: torch.Tensor  # (batch, text) bool, the concept's tokens
    at: torch.Tensor  # (steps, batch) bool
    head_weights: torch.Tensor  # (layers, heads)


class TrajectoryPoint(NamedTuple):
    """One step of a batch of runs; velocities are float32."""

    x_t: torch.Tensor  # (batch, frames, channels, height, width), what the model reads
    t: torch.Tensor  # (batch,) int64, or float32 where the scheduler's timesteps are floats
    velocity: torch.Tensor  # of the prompts
    negative: torch.Tensor | None  # of the negative prompts; `None` without guidance
    extra: torch.Tensor | None  # (chosen rows, ...), of the extra prompts
    attention: torch.Tensor | None  # (batch, video) weighted heads, zero where not asked for
    x_next: torch.Tensor  # the latents after the step


def teacher_trajectory(
    velocity: Velocity,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    prompt_embeds: Text,
    negative_prompt_embeds: Text,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    generators: Sequence[torch.Generator] | None = None,
    extra_prompt_embeds: Text | None = None,
    extra_at: torch.Tensor | None = None,
    attention: AttentionRequest | None = None,
    numbers: Sequence[int] | None = None,
    with_erasers: bool = False,
) -> Iterator[TrajectoryPoint]:
    """Sample with classifier-free guidance, as the model's pipeline does, and give every step.

    The guided velocity is `v(empty) + w (v(prompt) - v(empty))` (https://arxiv.org/abs/2207.12598, equation 6, with w
    = `guidance_scale`, or what the pipeline makes of it), unless the model takes the scale as an input. Each step is
    one batched pass over the rows of all prompts. The model's erasers are off in it; nothing of the model stays
    changed between two steps.

    Args:
        scheduler: predicts velocities; a copy is used.
        latents: `(batch, frames, channels, height, width)` normal noise; its dtype is that of the run.
        prompt_embeds, negative_prompt_embeds: `(batch, text, dim)`, or text of more than one tensor; the latter are
            not read with a `guidance_scale` of 1 or less.
        generators: one per row, for schedulers that draw noise in each step.
        extra_prompt_embeds: a further prompt per row, with a velocity but without a part in the guidance.
        extra_at: `(steps, batch)` bool, where that velocity is wanted; everywhere when `None`.
        numbers: of the rows' first frames, for image-to-video models (`Velocity.with_image`); by default one by one.
        with_erasers: leave the model's erasers on, as its pipeline would.
    """
    texts = (prompt_embeds, negative_prompt_embeds, extra_prompt_embeds)
    shapes = [tuple(token_embeds(text).shape) for text in texts if text is not None]
    if latents.ndim != 5 or len(set(shapes)) > 1 or shapes[0][:1] != latents.shape[:1]:
        raise ValueError(
            "`latents` must be (batch, frames, channels, height, width), with one row of embeddings "
            f"of one shape each, got {tuple(latents.shape)} and {shapes}."
        )
    check_predicts_velocity(scheduler, velocity)
    run = _Run(velocity, scheduler, num_inference_steps, latents, generators)
    if extra_prompt_embeds is not None and extra_at is None:
        extra_at = torch.ones(len(run.timesteps), len(latents), dtype=torch.bool)
    guidance_scale = velocity.guidance_weight(guidance_scale)
    numbers = range(len(latents)) if numbers is None else numbers
    asked_as = module_eval_mode if with_erasers else frozen_teacher
    return _walk(velocity, run, texts, guidance_scale, extra_at, attention, numbers, asked_as)


def guides(velocity: Velocity, guidance_scale: float) -> bool:
    """Whether a run asks for the empty prompt besides at a scale."""
    return velocity.guidance_weight(guidance_scale) != 1


def check_predicts_velocity(scheduler: SchedulerMixin, velocity: Velocity) -> None:
    """Raise `ValueError` where a scheduler reads the model's output as anything but a velocity of its kind."""
    if velocity.flow_matching:
        return check_flow_levels(scheduler)
    kind = scheduler.config.get("prediction_type")
    if kind not in velocity.prediction_types:
        wanted = " or ".join(map(repr, velocity.prediction_types))
        raise ValueError(
            f"`scheduler` must have the prediction type {wanted}, got {kind!r} in a "
            f"{type(scheduler).__name__}. Use the scheduler that comes with the model."
        )
    check_diffusion_levels(scheduler)


def run_timesteps(
    velocity: Velocity, scheduler: SchedulerMixin, num_inference_steps: int, latent_shape: Sequence[int]
) -> torch.Tensor:
    """The timesteps `(steps,)` of a run; the scheduler is left as it is."""
    scheduler = copy.deepcopy(scheduler)
    velocity.set_timesteps(scheduler, num_inference_steps, latent_shape)
    return scheduler.timesteps


def served_steps(
    velocity: Velocity, scheduler: SchedulerMixin, num_inference_steps: int, latent_shape: Sequence[int]
) -> list[int]:
    """The steps of a run at which the velocity's own transformer is asked: all, unless a model has several."""
    timesteps = run_timesteps(velocity, scheduler, num_inference_steps, latent_shape)
    served = velocity.serves(timesteps).nonzero().flatten().tolist()
    if not served:
        raise ValueError(
            f"`num_inference_steps` must have a step for each of the model's transformers, got {num_inference_steps}, "
            "of which one has none. Take more steps."
        )
    return served


@torch.no_grad()
def _walk(
    velocity: Velocity,
    run: _Run,
    texts: tuple[Text, Text, Text | None],
    guidance_scale: float,
    extra_at: torch.Tensor | None,
    attention: AttentionRequest | None,
    numbers: Sequence[int],
    asked_as: Callable[..., AbstractContextManager[None]],
) -> Iterator[TrajectoryPoint]:
    prompt, negative, extra = texts
    guided, batch = guidance_scale != 1, len(prompt)
    before = batch if guided else 0
    for step, timestep in enumerate(run.timesteps):
        x_t = velocity.with_image(run.model_input(timestep), numbers)
        # The batch of a pass: empty prompts where guidance needs them, prompts, chosen extra ones.
        rows, embeds = ([x_t, x_t], [negative, prompt]) if guided else ([x_t], [prompt])
        if extra is not None and extra_at[step].any():
            chosen = extra_at[step].to(x_t.device)
            rows, embeds = [*rows, x_t[chosen]], [*embeds, extra[chosen]]
        rows, embeds = torch.cat(rows), join_texts(embeds)
        asked = (rows, timestep.expand(len(rows)), embeds)
        maps = None
        with asked_as(*velocity.models):
            if attention is None or not attention.at[step].any():
                found = velocity.of_state(*asked)
            else:
                prompts = slice(before, before + batch)
                tokens = torch.zeros(token_embeds(embeds).shape[:2], dtype=torch.bool)
                tokens[prompts] = attention.token_mask.cpu() & attention.at[step].cpu()[:, None]
                with concept_attention(velocity.model, tokens, head_weights=attention.head_weights) as attended:
                    found = velocity.of_state(*asked)
                maps = attended.maps[prompts]
        unconditional = found[:before] if guided else None
        conditional, others = found[before : before + batch], found[before + batch :]
        guidance = conditional
        if guided:
            guidance = unconditional + guidance_scale * (conditional - unconditional)
        run.advance(step, guidance)
        times = timestep.expand(batch).to(torch.float32 if timestep.is_floating_point() else torch.int64)
        found = (conditional, unconditional, others if len(others) else None)
        found = [None if part is None else velocity.without_image(part) for part in found]
        yield TrajectoryPoint(x_t, times, *found, maps, run.latents)


class _Run:
    """The state of a batch of runs: its own scheduler, and the latents."""

    def __init__(
        self,
        velocity: Velocity,
        scheduler: SchedulerMixin,
        num_inference_steps: int,
        latents: torch.Tensor,
        generators: Sequence[torch.Generator] | None,
    ) -> None:
        self.scheduler = copy.deepcopy(scheduler)
        velocity.set_timesteps(self.scheduler, num_inference_steps, latents.shape[1:], latents.device)
        self.timesteps, self._straight = self.scheduler.timesteps, velocity.flow_matching
        if self._straight:  # noise has level 1, and pipelines count steps: timesteps may come twice
            self.latents = latents
            self.scheduler.set_begin_index(0)
        else:
            self.latents = latents * self.scheduler.init_noise_sigma
        accepted = inspect.signature(self.scheduler.step).parameters
        self._arguments: dict[str, Any] = {"return_dict": False}
        if "generator" in accepted and generators is not None:
            self._arguments["generator"] = list(generators)
        self._two_step = "old_pred_original_sample" in accepted
        self._last_clean: torch.Tensor | None = None

    def model_input(self, timestep: torch.Tensor) -> torch.Tensor:
        """What the model reads before a step."""
        return self.latents if self._straight else self.scheduler.scale_model_input(self.latents, timestep)

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
