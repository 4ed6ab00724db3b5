"""What the parts of `benchmarks/on_gpu.py` take by the operations of their shapes at an H100's published rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from benchmarks.gpu import null_space
from benchmarks.gpu.device import Place
from benchmarks.gpu.eraser_inference import ERASERS, ROWS
from benchmarks.gpu.eraser_training import planned_document, planned_step, run_of
from benchmarks.gpu.golden_noise import RUNS
from benchmarks.gpu.models import COG_2B, COG_5B, SDXL, WAN, base_model, needed_bytes, weight_bytes
from benchmarks.gpu.workers import Part
from benchmarks.machine import table
from diffusers_ext.planning.edit import draft_edit
from diffusers_ext.planning.gpus import MATMUL_UTILIZATION, find_gpu, gpu_seconds
from diffusers_ext.planning.models import ImageShapes, encode_prompts_work, guided_work
from diffusers_ext.planning.nullspace import NullSpaceRun
from diffusers_ext.planning.settings import EditPlanSettings, NullSpacePlanSettings
from diffusers_ext.planning.work import Precision, Work, trace_work

GPU, GIB = "H100", 2**30
# Assumed, for no shape tells them: seconds of imports (of a part whose imports are done while another is at work), of
# making models and tracing plans, of a compiler's work.
FIRST_START, START, MAKING, COMPILING = 20.0, 4.0, 12.0, 50.0
HOST_BANDWIDTH = 3e9  # bytes a second, of memory that is not pinned
_BFLOAT16 = Precision(torch.bfloat16)
_PLACE = Place(torch.device("meta"), False, lambda _: None)  # nothing is made there


class Line(NamedTuple):
    """Something that a part does so often, and what each time takes; `memory` is with all models that it needs."""

    what: str
    times: float
    tera: float  # 10^12 operations
    seconds: float
    memory: int | None = None  # bytes


def _line(what: str, times: float, work: Work, models: int = 1) -> Line:
    trace = trace_work(work)
    flops = sum(operation.flops * count for operation, count in trace.operations.items())
    seconds = gpu_seconds(trace.operations, find_gpu(GPU))
    return Line(what, times, flops / 1e12, seconds, needed_bytes(work, trace, models))


def _added(what: str, times: float, *lines: Line) -> Line:
    """All of these lines once, as one."""
    tera, seconds = (sum(getattr(one, name) * one.times for one in lines) for name in ("tera", "seconds"))
    return Line(what, times, tera, seconds, max(one.memory for one in lines))


@cache
def _call(name: str, rows: int, models: int = 1) -> Line:
    what = f"{name}: call of {rows} row{'s' if rows > 1 else ''}"
    return _line(what, 1, run_of(name, _PLACE)._teacher_work(1, rows), models)


def _training(name: str) -> list[Line]:
    run = run_of(name, _PLACE)
    apart, together = (planned_step(run_of(name, _PLACE, separate)).work for separate in (True, False))
    ours = [
        _line("training step of 2 rows, --separate_passes", 2, apart),
        _line("training step of 2 rows, one pass", 2, together),
    ]
    # Two of its passes are never gone back through.
    document = _added("7-forward step of 1 clip", 1, ours[0]._replace(times=2.5), _call(name, 1)._replace(times=2))
    return [*ours, document._replace(memory=planned_document(run, ours[0].memory))]


def _steps() -> list[Line]:
    return [
        _line(f"{name}: training step, {directions}", 12, null_space.step_work(name, _PLACE, directions), models=2)
        for name in null_space.BATCHES
        for directions in ("generalized", "plain")
    ]


def _shapes(name: str) -> ImageShapes:
    return ImageShapes(base_model(name, False), None, "nullspace")


def _statistics() -> list[Line]:
    lines, rows = [], null_space.RUN_PROMPTS + 1
    for name in null_space.BATCHES:
        shapes = _shapes(name)
        setting = NullSpacePlanSettings(
            features=list(null_space.FEATURES), statistics_batch_size=rows, mixed_precision="bf16", guidance_scale=5.0
        )
        text = encode_prompts_work(shapes, 64, 1, _BFLOAT16)
        lines.append(_line(f"{name}: 64 prompts through the text encoders", 12 * null_space.TEXTS // 64, text))
        bare, counted = guided_work(shapes, rows, 5.0, 1, _BFLOAT16), NullSpaceRun(shapes, setting).trajectory_work(1)
        lines.append(_line(f"{name}: denoising step of {rows} prompts", 6 * null_space.RUN_STEPS, bare))
        lines.append(_line(f"{name}: the same with statistics", 6 * null_space.RUN_STEPS, counted))
    return lines


def _edits() -> list[Line]:
    lines = []
    for name, count in null_space.PRESERVED.items():
        setting = EditPlanSettings(num_preserved_prompts=count, batch_size=32, mixed_precision="bf16")
        draft = draft_edit(base_model(name, False), setting)
        works = [work for phase in draft.phases for work in phase.works if work.times]
        edit = _added(f"{name}: edit", 2, *(_line("", work.times, work, models=0) for work in works))
        lines.append(edit._replace(memory=edit.memory + sum(draft.parts.values())))
    return lines


def _golden_noise() -> list[Line]:
    shapes = _shapes(SDXL)
    works = {scale: guided_work(shapes, 1, scale, 1, _BFLOAT16) for scale in RUNS.values()}
    return [_line(f"{SDXL}: a step with guidance {g:g}", 3 * steps, works[g]) for steps, g in RUNS.items()]


def _calls() -> list[Line]:
    times = 6 * len(ERASERS)
    return [_call(name, rows, models=2)._replace(times=times) for name, rows in ROWS.items()]


def _offload() -> list[Line]:
    size = weight_bytes(COG_2B, False)
    what = f"{COG_2B}: {size / GIB:.1f} GiB from or to the host (bandwidth assumed)"
    return [_call(COG_2B, 2)._replace(times=8), Line(what, 4, 0, size / HOST_BANDWIDTH, size)]


def _compile() -> list[Line]:
    return [_call(COG_2B, 1, models=2)._replace(times=12), Line("compilers (assumed)", 1, 0, COMPILING)]


_LINES: dict[str, Callable[[], list[Line]]] = {
    "train_5b": lambda: _training(COG_5B),
    "train_2b": lambda: _training(COG_2B),
    "train_wan": lambda: _training(WAN),
    "null_space": _steps,
    "statistics": _statistics,
    "edits": _edits,
    "golden_noise": _golden_noise,
    "calls": _calls,
    "offload": _offload,
    "compile": _compile,
}


def budget_text(parts: Sequence[Part]) -> str:
    """Operations, times, memory and limit of each part as Markdown, and then what they are made of."""
    whole, lines = [], []
    for index, part in enumerate(parts):
        start = START if index else FIRST_START
        own = [*_LINES[part.name](), Line("start, models, plans (assumed)", 1, 0, start + MAKING)]
        lines += [[part.name, one.what, f"{one.times:g}", *_cells(one)] for one in own]
        memory = max(one.memory or 0 for one in own)
        tera, seconds = (sum(getattr(one, name) * one.times for one in own) for name in ("tera", "seconds"))
        whole.append((part, Line(part.name, 1, tera, seconds, memory)))
    rows = [[one.what, *_cells(one), f"{part.limit:.0f}"] for part, one in whole]
    tera, seconds = (sum(getattr(one, name) for _, one in whole) for name in ("tera", "seconds"))
    rows.append(["all", *_cells(Line("", 1, tera, seconds, max(one.memory for _, one in whole))), ""])
    units = ["10^12 operations", "s", "GiB"]
    share = f"{MATMUL_UTILIZATION:.0%} are reached in matrix products (assumed)"
    texts = [
        table(["part", *units, "limit, s"], rows),
        f"By published rates of an {GPU}, of which {share}.",
        table(["part", "what", "times", *units], lines),
    ]
    return "\n\n".join(texts)


def _cells(line: Line) -> list[str]:
    memory = f"{line.memory / GIB:.1f}" if line.memory else ""
    return [f"{line.tera:.4g}", f"{line.seconds:.3g}", memory]
