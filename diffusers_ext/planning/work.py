"""A piece of work that a run does again and again: traced by shapes, or timed with random weights."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from diffusers_ext.core.gpu_autocast import gpu_autocast
from diffusers_ext.core.memory_trace import fake_tensors, fill_with_fake_tensors
from diffusers_ext.core.operation_trace import Operation, OperationTrace
from diffusers_ext.planning.cards import Card


WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of a card's published rates; what eager PyTorch reaches in models of this kind, by and large.
MATMUL_UTILIZATION, BANDWIDTH_UTILIZATION = 0.5, 0.75
LAUNCH_SECONDS = 5e-6
_TRACED_LAYERS = (2, 3)
_LEAST_REPEATS, _MOST_REPEATS, _TIMED_SECONDS = 3, 25, 1.0
_WEIGHT_SPREAD = 0.02


@dataclass(frozen=True)
class Precision:
    """How models are run in mixed precision.

    Attributes:
        dtype: of frozen weights and of autocast; float32 is no autocast.
        as_on_gpu: shapes without data are traced as a GPU would run them.
    """

    dtype: torch.dtype
    as_on_gpu: bool = True

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


class Job(NamedTuple):
    """Models without data, and how to begin once they have some.

    Attributes:
        modules: on the meta device.
        begin: makes inputs (and an optimizer) on a device; returns what is repeated.
    """

    modules: Sequence[torch.nn.Module]
    begin: Callable[[torch.device], Callable[[], object]]


@dataclass(frozen=True)
class Work:
    """One step of a phase.

    Attributes:
        name: of what its memory is used for.
        times: how often it is done in a run.
        make: a new job; takes the number of blocks where there are `layers`.
        kept_name: of what stays between two repetitions and after them, as an optimizer's state does;
            where there is nothing worth a name, it counts as `name`.
        layers: blocks of the job's model where it is traced with fewer; operations are linear in them.
    """

    name: str
    times: float
    make: Callable[..., Job]
    kept_name: str | None = None
    layers: int | None = None


class WorkTrace(NamedTuple):
    """What one repetition takes, from shapes alone."""

    kept: int  # bytes that are there between two repetitions, besides the modules
    peak: int  # the most bytes beyond these
    operations: Counter[Operation]


def trace_work(work: Work) -> WorkTrace:
    """Run one repetition over tensors without data.

    Of a model that is traced with fewer blocks only the operations are right.
    """
    few, more = _TRACED_LAYERS
    if work.layers is None or work.layers <= 2 * more:
        return _trace(work.make())
    first, second = (_trace(work.make(layers)) for layers in (few, more))
    steps = (work.layers - few) // (more - few)
    keys = first.operations.keys() | second.operations.keys()
    operations = Counter(
        {
            key: first.operations[key] + steps * (second.operations[key] - first.operations[key])
            for key in keys
        }
    )
    return WorkTrace(first.kept, second.peak, operations)


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


def card_seconds(operations: Counter[Operation], card: Card) -> float:
    """Time of operations on a card: each takes what its arithmetic or its traffic takes, or a launch."""
    bandwidth = 1e9 * card.bandwidth * BANDWIDTH_UTILIZATION
    return sum(
        count
        * max(
            operation.flops
            / (card.flops(operation.dtype, operation.convolution) * MATMUL_UTILIZATION),
            operation.bytes / bandwidth,
            LAUNCH_SECONDS,
        )
        for operation, count in operations.items()
    )


def measured_seconds(work: Work, device: torch.device) -> float:
    """Median time of one repetition with random weights, after one that is not counted.

    Args:
        work: small enough for the device.
        device: that is at hand.
    """
    modules, begin = work.make()
    generator = torch.Generator(device).manual_seed(0)
    for module in modules:
        module.to_empty(device=device)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data.normal_(std=_WEIGHT_SPREAD, generator=generator)
            else:
                tensor.data.zero_()
    repeat = begin(device)
    _seconds(repeat, device)
    times: list[float] = []
    while len(times) < _LEAST_REPEATS or (
        len(times) < _MOST_REPEATS and sum(times) < _TIMED_SECONDS
    ):
        times.append(_seconds(repeat, device))
    return statistics.median(times)


def _seconds(repeat: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    repeat()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
