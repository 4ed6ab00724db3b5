"""A piece of work that a run does again and again: traced by shapes, or timed with random weights."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.training_utils import EMAModel

from diffusers_ext.planning.optimizers import planned_optimizer
from diffusers_ext.planning.tracing import (
    Operation,
    OperationTrace,
    fake_tensors,
    fill_with_fake_tensors,
    gpu_autocast,
    move_other_tensors,
)

if TYPE_CHECKING:
    from diffusers_ext.planning.models import BaseModel

OPTIMIZER = "optimizer"
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TRACED_LAYERS = (2, 3)
_LEAST_REPEATS, _MOST_REPEATS, _TIMED_SECONDS = 3, 25, 1.0
_WEIGHT_SPREAD, _MAX_GRAD_NORM = 0.02, 1.0

Update = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Precision:
    """How models are run in mixed precision."""

    dtype: torch.dtype  # of frozen weights and of autocast; float32 is no autocast
    as_on_gpu: bool = True  # shapes without data are traced as a GPU would run them

    @contextmanager
    def autocast(self, model: torch.nn.Module) -> Iterator[None]:
        """Around a call of `model`."""
        device = next(model.parameters()).device.type
        if self.dtype == torch.float32:
            yield
        elif self.as_on_gpu and device == "cpu":
            with gpu_autocast(model, self.dtype):
                yield
        else:
            with torch.autocast(device, self.dtype):
                yield

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Let every call of `model` be under autocast, as accelerate does."""
        forward = model.forward

        def cast(*args: Any, **kwargs: Any) -> Any:
            with self.autocast(model):
                return forward(*args, **kwargs)

        model.forward = cast
        return model


class Job(NamedTuple):
    """Models without data, and how to begin once they have some."""

    modules: Sequence[torch.nn.Module]  # on the meta device
    begin: Callable[[torch.device], Callable[[], object]]  # makes inputs and an optimizer; returns what is repeated


@dataclass(frozen=True)
class Work:
    """One step of a phase."""

    name: str  # of what its memory is used for
    times: float  # how often it is done in a run
    make: Callable[..., Job]  # takes `num_layers` of the model where there are `layers`
    # Of what stays between two repetitions and after them, as an optimizer's state does; it counts as `name` without.
    kept_name: str | None = None
    layers: int | None = None  # blocks of a model that is traced with fewer; everything is linear in them
    apart: int = 0  # bytes of its memory that other names stand for


def inference_work(
    name: str,
    times: float,
    build: Callable[..., torch.nn.Module],
    begin: Callable[[torch.nn.Module, torch.device], Callable[[], object]],
    layers: int | None = None,
) -> Work:
    """Calls of one frozen model without gradients; `begin(model, device)` gives what is repeated."""

    def make(**changed: int) -> Job:
        model = build(**changed)
        return Job([model], lambda device: torch.no_grad()(begin(model, device)))

    return Work(name, times, make, layers=layers)


def training_works(
    work: Work,
    batches: int,
    precision: Precision,
    begin: Callable[[torch.nn.Module, torch.device], Callable[[], torch.Tensor]],
    *,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    ema: bool = False,
    update: Callable[[torch.optim.Optimizer, torch.device], Update] = lambda *_: nullcontext,
) -> list[Work]:
    """An optimizer's steps of some batches each: the last batch with the update, and the batches before it.

    Args:
        work: an optimizer step, whose `make` gives the model as it trains.
        begin: `begin(model, device)` gives the loss of one batch.
        optimizer: as of `--optimizer`.
        ema: averaged weights follow.
        update: `update(optimizer, device)` gives the context of the optimizer's steps.
    """

    def make(updates: bool, **changed: int) -> Job:
        model = precision.prepare(work.make(**changed))

        def begin_training(device: torch.device) -> Callable[[], object]:
            weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
            on_gpu = precision.as_on_gpu  # where all weights are worked on at once
            used = planned_optimizer(optimizer, weights, weight_decay=weight_decay, as_on_gpu=on_gpu)
            _make_state(used, keep_gradients=batches > 1)
            averaged = EMAModel(model.parameters()) if ema else None
            updating, loss = update(used, device), begin(model, device)

            def repeat() -> None:
                loss().backward()
                if not updates:
                    return
                torch.nn.utils.clip_grad_norm_(weights, _MAX_GRAD_NORM, foreach=on_gpu)
                with updating():
                    used.step()
                used.zero_grad(set_to_none=batches == 1)
                if averaged is not None:
                    averaged.step(model.parameters())

            return repeat

        return Job([model], begin_training)

    before = replace(work, times=work.times * (batches - 1), make=partial(make, False))
    return [replace(work, make=partial(make, True)), before]


def _make_state(optimizer: torch.optim.Optimizer, keep_gradients: bool) -> None:
    """Let an optimizer make its state, with gradients that are zero."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad(set_to_none=not keep_gradients)


class Phase(NamedTuple):
    """One phase of a run."""

    name: str
    resident: Sequence[str]  # names of the parts that are in memory all the time
    works: Sequence[Work]  # one after the other
    untimed: Sequence[Work] = ()  # what is done besides, in the memory and not in the time

    @property
    def traced(self) -> list[Work]:
        """All that takes memory."""
        return [*(work for work in self.works if work.times), *self.untimed]


@dataclass(frozen=True)
class Draft:
    """A run whose phases are known and whose works are still to be traced; otherwise as `RunPlan`."""

    tool: str
    model: BaseModel
    setting: Mapping[str, Any]
    parts: Mapping[str, int]  # of what needs no trace
    phases: Sequence[Phase]
    disk: Mapping[str, int]
    assumptions: Sequence[str] = ()


class WorkTrace(NamedTuple):
    """What one repetition takes, from shapes alone."""

    kept: int  # bytes that are there between two repetitions, besides the modules
    peak: int  # the most bytes beyond these
    operations: Counter[Operation]


def trace_work(work: Work) -> WorkTrace:
    """Run one repetition over tensors without data, of a model with many blocks by two with few."""
    few, more = _TRACED_LAYERS
    if work.layers is None or work.layers <= 2 * more:
        return _trace(work.make())
    first, second = (_trace(work.make(num_layers=layers)) for layers in (few, more))

    def linear(at_few: int, at_more: int) -> int:
        return at_few + (at_more - at_few) * (work.layers - few) // (more - few)

    keys = first.operations.keys() | second.operations.keys()
    return WorkTrace(
        linear(first.kept, second.kept),
        linear(first.peak, second.peak),
        Counter({k: linear(first.operations[k], second.operations[k]) for k in keys}),
    )


def _trace(job: Job) -> WorkTrace:
    modules, begin = job
    with fake_tensors():
        for module in modules:
            fill_with_fake_tensors(module)
        known = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        with OperationTrace(known) as trace:
            repeat = begin(torch.device("cpu"))
            kept = trace.live
            trace.reset()
            repeat()
    return WorkTrace(kept, trace.peak - kept, trace.operations)


def measured_seconds(work: Work, device: torch.device) -> float:
    """Median time of one repetition of `work` on `device` with random weights, after one that is not counted."""
    modules, begin = work.make()
    generator = torch.Generator(device).manual_seed(0)
    for module in modules:
        module.to_empty(device=device)
        move_other_tensors(module, device)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data.normal_(std=_WEIGHT_SPREAD, generator=generator)
            else:
                tensor.data.zero_()
    repeat = begin(device)
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    repeat()
    times: list[float] = []
    while len(times) < _LEAST_REPEATS or (len(times) < _MOST_REPEATS and sum(times) < _TIMED_SECONDS):
        wait()
        began = time.perf_counter()
        repeat()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
