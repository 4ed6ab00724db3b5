"""Denoising runs of the frozen model: the points at which an eraser is trained."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin

from diffusers_ext.core.restored_state import module_eval_mode
from diffusers_ext.core.seeds import check_diffusion_levels
from diffusers_ext.eraser.adapter.outputs import erasers_disabled
from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.families.family import Velocity


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


@contextmanager
def frozen_teacher(transformer: torch.nn.Module) -> Iterator[None]:
    """The model without its erasers, in eval mode and without gradients; all of it comes back."""
    with ExitStack() as restore:
        restore.enter_context(torch.no_grad())
        restore.enter_context(erasers_disabled(transformer))
        restore.enter_context(module_eval_mode(transformer))
        yield


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
        prompt_embeds: `(batch, text, dim)`.
        negative_prompt_embeds: the same shape; not read with a `guidance_scale` of 1 or less.
        generators: one per row, for schedulers that draw noise in each step.
        extra_prompt_embeds: a further prompt per row, with a velocity but without a part in the guidance.
        extra_at: `(steps, batch)` bool, where that velocity is wanted; everywhere when `None`.
        attention: where to read the concept's attention.

    Raises:
        ValueError: shapes that do not fit, or a scheduler that predicts something else.
    """
    _check_rows(latents, prompt_embeds, negative_prompt_embeds, extra_prompt_embeds)
    check_predicts_velocity(scheduler)
    run = _Run(scheduler, num_inference_steps, latents, generators)
    texts = (negative_prompt_embeds, prompt_embeds, extra_prompt_embeds)
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
    negative, prompt, extra = texts
    guided, batch = guidance_scale > 1, len(prompt)
    for step, timestep in enumerate(run.timesteps):
        x_t = run.scheduler.scale_model_input(run.latents, timestep)
        # The batch of a pass: empty prompts where guidance needs them, prompts, chosen extra ones.
        rows, embeds = ([x_t, x_t], [negative, prompt]) if guided else ([x_t], [prompt])
        if extra is not None and extra_at[step].any():
            chosen = extra_at[step].to(x_t.device)
            rows, embeds = [*rows, x_t[chosen]], [*embeds, extra[chosen]]
        rows, embeds = torch.cat(rows), torch.cat(embeds)
        before = batch if guided else 0
        with frozen_teacher(velocity.model):
            found, maps = _forward(velocity, rows, timestep, embeds, before, attention, step)
        unconditional = found[:before] if guided else None
        conditional, others = found[before : before + batch], found[before + batch :]
        guidance = conditional
        if guided:
            guidance = unconditional + guidance_scale * (conditional - unconditional)
        run.advance(step, guidance)
        times = timestep.expand(batch).to(torch.int64)
        found = (conditional, unconditional, others if len(others) else None)
        yield TrajectoryPoint(x_t, times, *found, maps, run.latents)


def _forward(
    velocity: Velocity,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    embeds: torch.Tensor,
    before: int,
    attention: AttentionRequest | None,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Velocities of all rows, and maps of the prompts' rows, which start at row `before`."""
    times = timestep.expand(len(x_t))
    if attention is None or not attention.at[step].any():
        return velocity(x_t, times, embeds), None
    prompts = slice(before, before + len(attention.token_mask))
    tokens = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    tokens[prompts] = attention.token_mask.cpu() & attention.at[step].cpu()[:, None]
    weights = attention.head_weights
    with concept_attention(velocity.model, tokens, head_weights=weights) as attended:
        found = velocity(x_t, times, embeds)
    return found, attended.maps[prompts]


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


def _check_rows(latents: torch.Tensor, *texts: torch.Tensor | None) -> None:
    shapes = [tuple(text.shape) for text in texts if text is not None]
    if latents.ndim != 5 or len(set(shapes)) > 1 or shapes[0][:1] != latents.shape[:1]:
        raise ValueError(
            "`latents` must be (batch, frames, channels, height, width), with one row of embeddings "
            f"of one shape each, got {tuple(latents.shape)} and {shapes}."
        )
