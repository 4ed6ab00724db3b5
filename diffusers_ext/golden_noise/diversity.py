"""Pictures of one prompt spread apart while they are drawn: the dial `diversity` of golden-noise pipelines.

Few-step models draw nearly the same picture from every seed. At each step the model predicts the finished picture;
with `m` the mean prediction for the same text of a few fixed noises, the prediction of a seed is moved away from it,

    x_0' = m + (1 + s) (x_0 - m),

and the next step starts from there, where the model makes a plausible picture of it again. As `x_0` is affine in the
model's output, and guidance an affine combination of outputs, moving the rows of a guided call one by one moves the
guided prediction alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Real
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.restored_state import CallScope
from diffusers_ext.families.family import Family
from diffusers_ext.families.predictions import Level, predicted_of, x_0_and_noise

# s at diversity 1: of the first step, which decides the layout, and of the others.
FIRST_SPREAD, SPREAD = 0.5, 0.25
NUM_PROBES = 8  # fixed noises whose mean prediction is that of the prompt
_PROBE_SEED = 0
_INPUTS = ("sample", "hidden_states")  # names of the latents in calls of denoisers
_PAUSED: ContextVar[bool] = ContextVar("diffusers_ext_spreading_paused", default=False)


def check_diversity(diversity: float) -> float:
    """`diversity` of a call; `TypeError` or `ValueError` unless it is a number from 0 to 1."""
    if isinstance(diversity, bool) or not isinstance(diversity, Real):
        raise TypeError(f"`diversity` must be a number, got a {type(diversity).__name__}.")
    if not (math.isfinite(diversity) and 0 <= diversity <= 1):
        raise ValueError(f"`diversity` must be from 0 to 1, got {diversity}.")
    return diversity


def spread_output(
    output: torch.Tensor, x_t: torch.Tensor, mean: torch.Tensor, level: Level, prediction_type: str, spread: float
) -> torch.Tensor:
    """The `output` at `x_t` whose prediction of the picture is `spread` further from the `mean` one."""
    x_0 = x_0_and_noise(output, x_t, level, prediction_type)[0]
    moved = x_0 + spread * (x_0 - mean)
    return predicted_of(moved, (x_t - level.signal * moved) / level.sigma, level, prediction_type)


@contextmanager
def spread_pictures(pipeline: DiffusionPipeline, family: Family, diversity: float) -> Iterator[None]:
    """Within the block every call of the pipeline's denoiser is moved away from the mean of its text; 0 does nothing.

    A row depends on its own latents and text alone, and no random number is drawn from a generator of the pipeline: a
    seed gives the same picture in any batch. Every call takes `NUM_PROBES` further ones.
    """
    if diversity == 0:
        yield
        return
    prediction_type = family.prediction_type(pipeline.scheduler)
    if prediction_type is None or (not family.flow_matching and not hasattr(pipeline.scheduler, "alphas_cumprod")):
        raise ValueError(
            "`diversity` must be 0 with a scheduler whose levels are not known, got "
            f"{diversity} with a {type(pipeline.scheduler).__name__}."
        )
    with CallScope() as scope:
        hook = _Spreading(pipeline, family, prediction_type, diversity, scope)
        handle = getattr(pipeline, family.denoiser).register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def without_spreading() -> Iterator[None]:
    """Calls of a denoiser that this thread makes within the block, inside of `spread_pictures`, stay as they are."""
    token = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(token)


class _Spreading:
    """A forward hook of a denoiser; its own calls go around the hooks."""

    def __init__(
        self, pipeline: DiffusionPipeline, family: Family, prediction_type: str, diversity: float, scope: CallScope
    ) -> None:
        self.pipeline, self.family, self.diversity = pipeline, family, diversity
        self.scope = scope  # outside of which, as in other threads that draw with this denoiser, nothing is moved
        self.start: float | None = None  # share of noise in the first step
        self.prediction_type = prediction_type

    @torch.no_grad()
    def __call__(self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if _PAUSED.get() or not self.scope.covers_this_call():
            return output
        name = next((name for name in _INPUTS if name in kwargs), None)
        given = args[0] if name is None else kwargs[name]
        x_t = _stacked(given)
        level = self._level(args, kwargs, x_t)
        generator = torch.Generator().manual_seed(_PROBE_SEED)
        means = []
        for _ in range(NUM_PROBES):
            # Standard normal numbers are what a model sees of pure noise; the timestep stays that of the call.
            probe = torch.randn(x_t.shape[1:], generator=generator).to(x_t).expand_as(x_t)
            placed = list(probe.unbind(0)) if isinstance(given, (list, tuple)) else probe
            if name is None:
                other = denoiser.forward(placed, *args[1:], **kwargs)
            else:
                other = denoiser.forward(*args, **{**kwargs, name: placed})
            means.append(self._picture(self._output(_first(other), x_t), probe, level))
        plain = self._output(_first(output), x_t)
        mean = torch.stack(means).mean(0)
        noise = level.sigma.max().item()
        self.start = noise if self.start is None else self.start
        spread = self.diversity * (FIRST_SPREAD if noise >= self.start else SPREAD)
        moved = spread_output(plain, x_t.float(), mean, level, self.prediction_type, spread)
        return _replaced(output, self._placed(moved, _first(output)))

    def _level(self, args: tuple[Any, ...], kwargs: dict[str, Any], x_t: torch.Tensor) -> Level:
        scheduler = self.pipeline.scheduler
        if self.family.flow_matching:
            index = scheduler.step_index if scheduler.step_index is not None else (scheduler.begin_index or 0)
            times = scheduler.sigmas[index].expand(len(x_t)) * scheduler.config.num_train_timesteps
        else:
            times = kwargs["timestep"] if "timestep" in kwargs else args[1]
            times = torch.as_tensor(times).reshape(-1).expand(len(x_t)).long()
        return self.family.level(scheduler, times.to(x_t.device), x_t.float())

    def _picture(self, output: torch.Tensor, x_t: torch.Tensor, level: Level) -> torch.Tensor:
        return x_0_and_noise(output, x_t.float(), level, self.prediction_type)[0]

    def _output(self, first: Any, x_t: torch.Tensor) -> torch.Tensor:
        """What the scheduler would read of the denoiser's output, float32: not the variance that some add to it."""
        output = _stacked(first).float()
        output = output[:, : x_t.shape[1]]
        return -output if self.family.negated_output else output

    def _placed(self, moved: torch.Tensor, first: Any) -> Any:
        moved = -moved if self.family.negated_output else moved
        plain = _stacked(first)
        whole = torch.cat([moved.to(plain.dtype), plain[:, moved.shape[1] :]], 1)
        return list(whole.unbind(0)) if isinstance(first, (list, tuple)) else whole


def _stacked(given: Any) -> torch.Tensor:
    return torch.stack(list(given)) if isinstance(given, (list, tuple)) else given


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output.sample


def _replaced(output: Any, first: Any) -> Any:
    return (first, *output[1:]) if type(output) is tuple else type(output)(sample=first)
