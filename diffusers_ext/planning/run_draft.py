"""From the phases of a run to its plan: what each piece of work takes, on which device."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from diffusers_ext.planning.base_model import BaseModel
from diffusers_ext.planning.gpus import Gpu, find_gpu
from diffusers_ext.planning.run_plan import GIB, PhasePlan, RunPlan
from diffusers_ext.planning.work import (
    BANDWIDTH_UTILIZATION,
    LAUNCH_SECONDS,
    MATMUL_UTILIZATION,
    Work,
    WorkTrace,
    gpu_seconds,
    measured_seconds,
    trace_work,
)


HERE = "here"
_MEMORY = "Peaks are of tensors; workspaces inside of kernels are left to the reserve."
_TIME = (
    "Time is that of computing alone on one device: loading, downloads, reading and writing of files, "
    "eigendecompositions, and the few milliseconds that a training loop adds to a step are not in it."
)


class Phase(NamedTuple):
    """One phase of a run.

    Attributes:
        name: of the phase.
        resident: names of the parts that are in memory all the time.
        works: what is done in it, one after the other.
        untimed: what is done besides, in the memory and not in the time.
    """

    name: str
    resident: Sequence[str]
    works: Sequence[Work]
    untimed: Sequence[Work] = ()

    @property
    def traced(self) -> list[Work]:
        """All that takes memory."""
        return [*(work for work in self.works if work.times), *self.untimed]


@dataclass(frozen=True)
class RunDraft:
    """A run whose phases are known and whose works are still to be traced.

    Attributes:
        tool, model, setting: as in `RunPlan`.
        parts: bytes of what needs no trace, by name.
        phases: in order.
        disk: bytes by what takes them.
        assumptions: of this run.
    """

    tool: str
    model: BaseModel
    setting: Mapping[str, Any]
    parts: Mapping[str, int]
    phases: Sequence[Phase]
    disk: Mapping[str, int]
    assumptions: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Target:
    """What a run is planned for.

    Attributes:
        name: for people; `None` where no device is named.
        memory: bytes, if they are known.
        gpu: whose figures are published.
        device: that is at hand.
    """

    name: str | None
    memory: int | None
    gpu: Gpu | None = None
    device: torch.device | None = None

    @property
    def as_on_gpu(self) -> bool:
        """Whether shapes are traced as a GPU runs them."""
        return self.device is None or self.device.type == "cuda"


def find_target(gpu: str | None, memory_gib: float | None) -> Target:
    """The device of a plan.

    Args:
        gpu: name of a card, `"here"` for the device at hand, or `None`.
        memory_gib: of the device, in place of what is known of it.

    Raises:
        ValueError: an unknown card, or no memory.
    """
    if memory_gib is not None and not memory_gib > 0:
        raise ValueError(f"`memory_gib` must be positive, got {memory_gib}.")
    given = None if memory_gib is None else int(memory_gib * GIB)
    if gpu is None:
        return Target(None, given)
    if gpu != HERE:
        gpu = find_gpu(gpu)
        return Target(gpu.name, given or int(gpu.memory_gib * GIB), gpu)
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        return Target(properties.name, given or properties.total_memory, device=device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Target("this CPU", given or memory, device=torch.device("cpu"))


def finish_plan(draft: RunDraft, target: Target, exact: bool = False) -> RunPlan:
    """Trace all works of a draft, and time them for the target.

    Nothing is timed on the device at hand where the run does not fit it. With `exact` all blocks of a
    model are traced, not a few.
    """
    works = [work for phase in draft.phases for work in phase.traced]
    traces = {id(w): trace_work(replace(w, layers=None) if exact else w) for w in works}
    parts = dict(draft.parts)
    for work in works:
        _add_parts(parts, work, traces[id(work)])
    phases = [PhasePlan(phase.name, _peak(phase, parts, traces), None) for phase in draft.phases]
    plan = RunPlan(
        draft.tool,
        draft.model.name,
        draft.setting,
        {name: size for name, size in parts.items() if size},
        tuple(phases),
        draft.disk,
        draft.model.download,
        target.name,
        target.memory,
    )
    timed = target.gpu is not None or (target.device is not None and plan.fits)
    if timed:
        seconds = [_seconds(phase, traces, target) for phase in draft.phases]
        phases = [p._replace(seconds=s) for p, s in zip(phases, seconds, strict=True)]
    assumptions = (*draft.assumptions, _MEMORY, *_time_assumptions(target, timed))
    return RunPlan(**{**vars(plan), "phases": tuple(phases), "assumptions": assumptions})


def _add_parts(parts: dict[str, int], work: Work, trace: WorkTrace) -> None:
    peak = trace.peak if work.kept_name else trace.kept + trace.peak
    parts[work.name] = max(parts.get(work.name, 0), peak - work.apart)
    if work.kept_name:
        parts[work.kept_name] = max(parts.get(work.kept_name, 0), trace.kept)


def _peak(phase: Phase, parts: Mapping[str, int], traces: Mapping[int, WorkTrace]) -> int:
    own = {work.kept_name for work in phase.works}
    resident = sum(parts[name] for name in phase.resident if name not in own)
    found = (traces[id(work)] for work in phase.traced)
    return resident + max((trace.kept + trace.peak for trace in found), default=0)


def _seconds(phase: Phase, traces: Mapping[int, WorkTrace], target: Target) -> float:
    total = 0.0
    for work in (work for work in phase.works if work.times):
        if target.gpu is not None:
            total += work.times * gpu_seconds(traces[id(work)].operations, target.gpu)
        else:
            total += work.times * measured_seconds(work, target.device)
    return total


def _time_assumptions(target: Target, timed: bool) -> list[str]:
    if target.gpu is not None:
        return [
            f"Each operation takes what its arithmetic takes at {MATMUL_UTILIZATION:.0%} of the card's "
            f"published rate, what its traffic takes at {BANDWIDTH_UTILIZATION:.0%} of the published "
            f"bandwidth, or {1e6 * LAUNCH_SECONDS:g} microseconds, whichever is longest.",
            _TIME,
        ]
    if timed:
        return [
            "One repetition of each step was timed on this device with random weights (median), and "
            "multiplied.",
            _TIME,
        ]
    if target.device is not None:
        return ["Nothing was timed, as the run does not fit this device."]
    return []
