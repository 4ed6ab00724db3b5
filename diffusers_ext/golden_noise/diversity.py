"""Pictures of one prompt spread apart while they are drawn: the dial `diversity` of golden-noise pipelines.

Few-step models draw nearly the same picture from every seed. There are two ways to spread them.

`"prediction"`: at each step the model predicts the finished picture; with `m` the mean prediction for the same text of
a few fixed noises, the prediction of a seed is moved away from it,

    x_0' = m + (1 + s) (x_0 - m),

and the next step starts from there, where the model makes a plausible picture of it again. As `x_0` is affine in the
model's output, and guidance an affine combination of outputs, moving the rows of a guided call one by one moves the
guided prediction alike.

`"prompt"`: in the first step, which decides the layout, the model reads the prompt's token embeddings e moved by noise
n of the seed's own,

    e' = (e + g rms(e) n) / sqrt(1 + g^2),

token by token, as CADS does in all early steps (arXiv:2310.17347). n is drawn from no generator: it lies along fixed
directions as the noise of the picture does along others, so that it changes with the noise as smoothly.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.restored_state import CallScope
from diffusers_ext.families.family import Family, import_class
from diffusers_ext.families.predictions import Level, predicted_of, predicted_x_0

WAYS = ("prediction", "prompt", "both")  # of `diversity_of`
# s at diversity 1: of the first step, which decides the layout, and of the others.
FIRST_SPREAD, SPREAD = 0.5, 0.25
NUM_PROBES = 8  # fixed noises whose mean prediction is that of the prompt
PROMPT_NOISE = 0.5  # g at diversity 1
NUM_DIRECTIONS = 16  # of a prompt's noise
_PROBE_SEED, _NOISE_SEED, _PROMPT_SEED = 0, 1_000, 2_000
_BLOCK = 16  # tokens whose directions are drawn at once, so that longer texts change none of them
_TEXTS = ("encoder_hidden_states", "encoder_hidden_states_t5", "cap_feats")  # tokens, in calls of denoisers
_PAUSED: ContextVar[bool] = ContextVar("diffusers_ext_spreading_paused", default=False)


def check_way(diversity_of: str) -> str:
    """`diversity_of` of a call; `ValueError` for what is none of `WAYS`."""
    if diversity_of not in WAYS:
        raise ValueError(f"`diversity_of` must be one of {list(WAYS)}, got {diversity_of!r}.")
    return diversity_of


def check_levels(scheduler: Any, family: Family, rule: str) -> str:
    """What the model predicts; `ValueError` of the `rule` for a scheduler whose levels of noise are not known."""
    found = family.prediction_type(scheduler)
    if found is None or (not family.flow_matching and not hasattr(scheduler, "alphas_cumprod")):
        raise ValueError(
            f"{rule} with a scheduler whose levels are not known, got a {type(scheduler).__name__}. Take another one."
        )
    return found


def step_spread(diversity: float, first: bool) -> float:
    """s of a step."""
    return diversity * (FIRST_SPREAD if first else SPREAD)


def mean_prediction(predict: Callable[[torch.Tensor], torch.Tensor], x_t: torch.Tensor) -> torch.Tensor:
    """Mean of `predict` over the fixed noises, of unit variance, each for all rows of a batch like `x_t`."""
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    noises = (torch.randn(x_t.shape[1:], generator=generator) for _ in range(NUM_PROBES))
    return torch.stack([predict(noise.to(x_t).expand_as(x_t)) for noise in noises]).mean(0)


def spread_output(
    output: torch.Tensor, x_t: torch.Tensor, mean: torch.Tensor, level: Level, prediction_type: str, spread: float
) -> torch.Tensor:
    """The `output` at `x_t` whose prediction of the picture is `spread` further from the `mean` one."""
    x_0 = predicted_x_0(output, x_t, level, prediction_type)
    moved = x_0 + spread * (x_0 - mean)
    return predicted_of(moved, (x_t - level.signal * moved) / level.sigma, level, prediction_type)


def moved_prompts(texts: Sequence[torch.Tensor], noise: torch.Tensor, amount: float) -> list[torch.Tensor]:
    """Token embeddings `(tokens, width)` moved by `amount` g as the `noise` of each picture says; rms is kept."""
    flat = noise.float().flatten(1)
    along = [flat @ _direction(_NOISE_SEED + k, noise.shape[1:]).to(flat).flatten() for k in range(NUM_DIRECTIONS)]
    weights = torch.nn.functional.normalize(torch.stack(along), dim=0)
    longest = torch.Size((max(len(text) for text in texts), texts[0].shape[1]))
    drawn = [torch.zeros_like(text, dtype=torch.float32) for text in texts]
    for k, parts in enumerate(weights.unbind(0)):
        direction = _direction(_PROMPT_SEED + k, longest).to(flat)
        for row, part in zip(drawn, parts, strict=True):
            row += part * direction[: len(row)]
    moved = []
    for text, change in zip(texts, drawn, strict=True):
        rms = text.float().square().mean(1, keepdim=True).sqrt()
        moved.append(((text + amount * rms * change) / math.sqrt(1 + amount**2)).to(text.dtype))
    return moved


def _direction(seed: int, shape: torch.Size) -> torch.Tensor:
    """Standard normal numbers of a shape; those of a longer first axis begin with the same ones."""
    generator = torch.Generator().manual_seed(seed)
    blocks = range(-(-shape[0] // _BLOCK))
    return torch.cat([torch.randn(_BLOCK, *shape[1:], generator=generator) for _ in blocks])[: shape[0]]


@contextmanager
def spread_pictures(
    pipeline: DiffusionPipeline, family: Family, diversity: float, diversity_of: str = "prediction"
) -> Iterator[None]:
    """Within the block calls of the pipeline's denoiser in this thread are spread apart; 0 does nothing.

    A row depends on its own latents and text alone, and no random number is drawn from a generator of the pipeline: a
    seed gives the same picture in any batch. To move predictions every call takes `NUM_PROBES` further ones.
    """
    check_way(diversity_of)
    if diversity == 0:
        yield
        return
    prediction_type = check_levels(pipeline.scheduler, family, "`diversity` must be 0")
    denoiser = getattr(pipeline, family.denoiser)
    handles = []
    with CallScope() as scope:
        spreading = _Spreading(pipeline, family, prediction_type, diversity, scope)
        try:
            if diversity_of != "prediction":
                handles.append(denoiser.register_forward_pre_hook(spreading.move_prompt, with_kwargs=True))
            if diversity_of != "prompt":
                handles.append(denoiser.register_forward_hook(spreading.move_prediction, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Call(NamedTuple):
    """Arguments of a denoiser's call, by name wherever they stand: what wraps it may look for keywords."""

    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def get(self, name: str) -> Any:
        place = self.names.index(name) if name in self.names else len(self.args)
        return self.args[place] if place < len(self.args) else self.kwargs.get(name)

    def replaced(self, name: str, value: Any) -> _Call:
        place = self.names.index(name)
        if place < len(self.args):
            return self._replace(args=(*self.args[:place], value, *self.args[place + 1 :]))
        return self._replace(kwargs={**self.kwargs, name: value})


@contextmanager
def without_spreading() -> Iterator[None]:
    """Calls of a denoiser that this thread makes within the block, inside of `spread_pictures`, stay as they are."""
    token = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(token)


class _Spreading:
    """Hooks of a denoiser for one call of a pipeline; calls that they make go around the hooks."""

    def __init__(
        self, pipeline: Any, family: Family, prediction_type: str, diversity: float, scope: CallScope
    ) -> None:
        self.pipeline, self.family, self.diversity = pipeline, family, diversity
        self.scope = scope  # outside of which, as in other threads that draw with this denoiser, nothing is moved
        self.start: float | None = None  # share of noise in the first step
        self.prediction_type = prediction_type
        forward = inspect.signature(import_class(family.denoiser_class).forward)
        self.names = tuple(forward.parameters)[1:]  # the latents' is the first
        self.unmoved: _Call | None = None  # the one whose prompt is moved

    def move_prompt(
        self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """In the first step, the call's arguments with other text."""
        if _PAUSED.get() or not self.scope.covers_this_call():
            return None
        call = _Call(self.names, args, kwargs)
        x_t = _stacked(call.get(self.names[0]))
        if not self._is_first(self._level(call, x_t)):
            return None
        self.unmoved = call
        amount = self.diversity * PROMPT_NOISE
        for name in _TEXTS:
            text = call.get(name)
            if text is not None:
                moved = moved_prompts(list(text), x_t, amount)
                call = call.replaced(name, moved if isinstance(text, (list, tuple)) else torch.stack(moved))
        return call.args, call.kwargs

    @torch.no_grad()
    def move_prediction(
        self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The call's output, further from the mean one for the text as it was given."""
        if _PAUSED.get() or not self.scope.covers_this_call():
            return output
        call, self.unmoved = self.unmoved or _Call(self.names, args, kwargs), None
        given = call.get(self.names[0])
        x_t = _stacked(given)
        level = self._level(call, x_t)

        def predict(noise: torch.Tensor) -> torch.Tensor:
            placed = list(noise.unbind(0)) if isinstance(given, (list, tuple)) else noise
            probe = call.replaced(self.names[0], placed)  # the timestep stays that of the call
            other = denoiser.forward(*probe.args, **probe.kwargs)
            output = self._output(_first(other), x_t)
            return predicted_x_0(output, noise.float(), level, self.prediction_type)

        plain, mean = self._output(_first(output), x_t), mean_prediction(predict, x_t)
        spread = step_spread(self.diversity, self._is_first(level))
        moved = spread_output(plain, x_t.float(), mean, level, self.prediction_type, spread)
        return _replaced(output, self._placed(moved, _first(output)))

    def _is_first(self, level: Level) -> bool:
        noise = level.sigma.max().item()
        self.start = noise if self.start is None else self.start
        return noise >= self.start

    def _level(self, call: _Call, x_t: torch.Tensor) -> Level:
        scheduler = self.pipeline.scheduler
        if self.family.flow_matching:
            index = scheduler.step_index if scheduler.step_index is not None else (scheduler.begin_index or 0)
            times = scheduler.sigmas[index].expand(len(x_t)) * scheduler.config.num_train_timesteps
        else:
            times = torch.as_tensor(call.get("timestep")).reshape(-1).expand(len(x_t))
        return self.family.level(scheduler, times, x_t.float())

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
