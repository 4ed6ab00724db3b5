"""What a run takes before it is run, as facts and as text, and how to train an eraser within the memory of a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch

from diffusers_ext.core.settings import Settings, with_new_names
from diffusers_ext.planning.edit import EditPlanSettings, draft_edit
from diffusers_ext.planning.eraser import draft_eraser
from diffusers_ext.planning.golden_noise import draft_golden_noise
from diffusers_ext.planning.gpus import (
    BANDWIDTH_UTILIZATION,
    LAUNCH_SECONDS,
    MATMUL_UTILIZATION,
    Gpu,
    find_gpu,
    gpu_seconds,
)
from diffusers_ext.planning.models import read_base_model
from diffusers_ext.planning.noise_guard import draft_guard
from diffusers_ext.planning.nullspace import draft_nullspace
from diffusers_ext.planning.settings import (
    EraserPlanSettings,
    GoldenNoisePlanSettings,
    GuardPlanSettings,
    NullSpacePlanSettings,
)
from diffusers_ext.planning.table import plan_text
from diffusers_ext.planning.work import Draft, Phase, Work, WorkTrace, measured_seconds, trace_work

GIB = 2**30
HERE = "here"
_DRAFTS: dict[str, tuple[Callable[..., Draft], type[Settings]]] = {
    "nullspace": (draft_nullspace, NullSpacePlanSettings),
    "golden-noise": (draft_golden_noise, GoldenNoisePlanSettings),
    "guard": (draft_guard, GuardPlanSettings),
    "eraser": (draft_eraser, EraserPlanSettings),
    "edit": (draft_edit, EditPlanSettings),
}
TOOLS = tuple(_DRAFTS)
_MEMORY = "Peaks are of tensors; workspaces inside of kernels are left to the reserve."
_TIME = (
    "Time is that of computing alone on one device: loading, downloads, reading and writing of files, "
    "eigendecompositions, and the few milliseconds that a training loop adds to a step are not in it."
)
_FACTS = (
    "tool model setting device memory reserve fits missing peak worst_phase parts phases seconds disk disk_total "
    "download assumptions"
).split()


class PhasePlan(NamedTuple):
    """One phase of a run."""

    name: str
    peak: int  # bytes on the device, everything that is there included
    seconds: float | None  # `None` where no device is known


@dataclass(frozen=True)
class RunPlan:
    """What a run of a tool takes, before it is run. Sizes are bytes, times are seconds of one device."""

    tool: str
    model: str  # name or folder of the base model
    setting: Mapping[str, Any]  # of the run, defaults filled in
    parts: Mapping[str, int]  # memory by what takes it
    phases: tuple[PhasePlan, ...]  # in the order in which they are run
    disk: Mapping[str, int]  # by what takes it, also what is kept in the host's memory instead, as the run is told
    download: int  # of the base model; 0 for a folder
    device: str | None = None  # what the time is for
    memory: int | None = None  # of the device; `None` where none was named
    reserve: int = GIB  # what of it the run cannot have: context of the device, fragmentation
    assumptions: tuple[str, ...] = ()  # what was taken for granted, sentence by sentence

    @property
    def peak(self) -> int:
        """Memory of the worst phase."""
        return max(phase.peak for phase in self.phases)

    @property
    def worst_phase(self) -> str:
        """Name of the phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak).name

    @property
    def disk_total(self) -> int:
        """Everything that the run writes; the download is not in it."""
        return sum(self.disk.values())

    @property
    def seconds(self) -> float | None:
        """Of all phases; `None` where no device is known."""
        known = [phase.seconds for phase in self.phases]
        return None if None in known else sum(known)

    @property
    def fits(self) -> bool | None:
        """Whether the device's memory suffices; `None` where it is not known."""
        return None if self.memory is None else self.peak + self.reserve <= self.memory

    @property
    def missing(self) -> int:
        """Bytes that the device has too few; 0 where the run fits or no memory is known."""
        return 0 if self.memory is None else max(0, self.peak + self.reserve - self.memory)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        facts = {name: _plain(getattr(self, name)) for name in _FACTS}
        return {**facts, "phases": [phase._asdict() for phase in self.phases]}

    def table(self) -> str:
        """Everything, as people read it."""
        return plan_text(self.to_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def plan_run(
    tool: str,
    model: str | os.PathLike,
    *,
    gpu: str | None = None,
    memory_gib: float | None = None,
    exact: bool = False,
    **setting: Any,
) -> RunPlan:
    """What a run takes: memory by part and by phase, disk, and time.

    Shapes alone are looked at; nothing is downloaded, and of a folder only configs are read.

    Args:
        tool: `"nullspace"`, `"golden-noise"`, `"guard"`, `"eraser"` or `"edit"`.
        model: a published base model such as `"SDXL"` or `"zai-org/CogVideoX-5b"`, or the folder of a pipeline.
        gpu: a card such as `"RTX 4090"`, whose published figures give the time; `"here"` times one repetition of each
            step on the device at hand, with random weights. No time when `None`.
        memory_gib: of the device, in place of what is known of it.
        exact: all blocks of a model are traced; otherwise a few, and the rest is linear in their number.
        setting: of the run, by the names of the training scripts; see `setting_names`.

    Raises:
        ValueError: an unknown tool, model, card or setting, or one that the model cannot take.
    """
    names = setting_names(tool)
    draft, settings_class = _DRAFTS[tool]
    setting = with_new_names(setting, settings_class)
    unknown = sorted(setting.keys() - set(names))
    if unknown:
        raise ValueError(
            f"`setting` of {tool!r} must be among {names}, got {unknown[0]!r}. Leave it out, or check its name."
        )
    target = _find_target(gpu, memory_gib)
    base = read_base_model(model)
    return _finish(draft(base, settings_class(**setting), as_on_gpu=target.as_on_gpu), target, exact)


def setting_names(tool: str) -> list[str]:
    """What `plan_run` takes as the setting of a tool."""
    if tool not in _DRAFTS:
        raise ValueError(f"`tool` must be one of {TOOLS}, got {tool!r}.")
    return [field.name for field in fields(_DRAFTS[tool][1])]


class _Target(NamedTuple):
    name: str | None  # for people; `None` where no device is named
    memory: int | None  # bytes, if they are known
    gpu: Gpu | None = None  # whose figures are published
    device: torch.device | None = None  # that is at hand

    @property
    def as_on_gpu(self) -> bool:
        """Whether shapes are traced as a GPU runs them."""
        return self.device is None or self.device.type == "cuda"


def _find_target(name: str | None, memory_gib: float | None) -> _Target:
    """The device of a plan, by a GPU's name or `HERE`; `ValueError` for an unknown one, or no memory."""
    if memory_gib is not None and not memory_gib > 0:
        raise ValueError(f"`memory_gib` must be positive, got {memory_gib}.")
    given = None if memory_gib is None else int(memory_gib * GIB)
    if name is None:
        return _Target(None, given)
    if name != HERE:
        gpu = find_gpu(name)
        return _Target(gpu.name, given or int(gpu.memory_gib * GIB), gpu)
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        return _Target(properties.name, given or properties.total_memory, device=device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _Target("this CPU", given or memory, device=torch.device("cpu"))


def _finish(draft: Draft, target: _Target, exact: bool) -> RunPlan:
    """Trace all works, and time them for the target: on the device at hand only where the run fits."""
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
    return replace(plan, phases=tuple(phases), assumptions=assumptions)


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


def _seconds(phase: Phase, traces: Mapping[int, WorkTrace], target: _Target) -> float:
    def once(work: Work) -> float:
        if target.gpu is None:
            return measured_seconds(work, target.device)
        return gpu_seconds(traces[id(work)].operations, target.gpu)

    return sum(work.times * once(work) for work in phase.works if work.times)


def _time_assumptions(target: _Target, timed: bool) -> list[str]:
    if target.gpu is not None:
        return [
            f"Each operation takes what its arithmetic takes at {MATMUL_UTILIZATION:.0%} of the card's "
            f"published rate, what its traffic takes at {BANDWIDTH_UTILIZATION:.0%} of the published "
            f"bandwidth, or {1e6 * LAUNCH_SECONDS:g} microseconds, whichever is longest.",
            _TIME,
        ]
    if timed:
        return [
            "One repetition of each step was timed on this device with random weights (median), and multiplied.",
            _TIME,
        ]
    if target.device is not None:
        return ["Nothing was timed, as the run does not fit this device."]
    return []


_SMALL_RANK, _MOST_ROWS, _FEWER_FRAMES = 32, 8, (81, 49, 33, 17, 9)


def recommend_eraser_training(model: str | os.PathLike, memory_gib: float, **setting: Any) -> RunPlan:
    """The plan that loses least and fits a GPU; the smallest that was tried where nothing does.

    Clips stay as asked for as long as anything fits: first without gradient checkpointing, then with it, then with
    target and preserved rows in turn, then with a small rank; after that clips get shorter. Where it fits with room,
    rows are doubled. Checkpointing and rows of `setting` are chosen here; otherwise as `plan_run`.
    """
    reserve_gib = RunPlan.reserve / GIB
    if memory_gib <= reserve_gib:
        raise ValueError(f"`memory_gib` must be above the reserve {reserve_gib}, got {memory_gib}.")
    smallest = None
    for frugal in _frugal(model, memory_gib, setting):
        if frugal.fits:
            return _least_frugal(model, memory_gib, setting, frugal)
        if smallest is None or frugal.peak < smallest.peak:
            smallest = frugal
    return smallest


def _frugal(model: str | os.PathLike, memory_gib: float, setting: dict[str, Any]) -> Iterator[RunPlan]:
    """Plans with everything that saves memory, from the clips asked for to the shortest."""
    saving = {"target_rows": 1, "preserved_rows": 1, "separate_passes": True, "gradient_checkpointing": True}
    plan = plan_run("eraser", model, memory_gib=memory_gib, **{**setting, **saving})
    yield plan
    asked, rank = plan.setting["num_frames"], plan.setting["rank"]
    for frames in (asked, *(frames for frames in _FEWER_FRAMES if frames < asked)):
        for fewer in sorted({rank, min(rank, _SMALL_RANK)}, reverse=True):
            if (frames, fewer) != (asked, rank):
                less = {**setting, **saving, "num_frames": frames, "rank": fewer}
                yield plan_run("eraser", model, memory_gib=memory_gib, **less)


def _least_frugal(model: str | os.PathLike, memory_gib: float, setting: dict[str, Any], frugal: RunPlan) -> RunPlan:
    """The first that fits of the plans that save less than one that fits."""
    size = {name: frugal.setting[name] for name in ("num_frames", "rank")}
    for checkpointing in (False, True):
        found, rows = None, 1
        while rows <= _MOST_ROWS:
            more = {"target_rows": rows, "preserved_rows": rows, "separate_passes": False}
            options = {**setting, **size, **more, "gradient_checkpointing": checkpointing}
            plan = plan_run("eraser", model, memory_gib=memory_gib, **options)
            if not plan.fits:
                break
            found, rows = plan, 2 * rows
        if found is not None:
            return found
    return frugal
