"""How to train an eraser within the memory of a given GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from diffusers_ext.planning.plan import GIB, RunPlan, plan_run

_SMALL_RANK, _MOST_ROWS = 32, 8
_FEWER_FRAMES = (81, 49, 33, 17, 9)


def recommend_eraser_training(model: str | os.PathLike, memory_gib: float, **setting: Any) -> RunPlan:
    """The plan that loses least and fits a GPU; the smallest that was tried where nothing does.

    Clips stay as asked for as long as anything fits: first without gradient checkpointing, then with it, then with
    target and preserved rows in turn, then with a small rank; after that clips get shorter. Where it fits with room,
    rows are doubled.

    Args:
        model: as for `plan_run`.
        memory_gib: of the GPU.
        setting: what is wanted; checkpointing and rows are chosen here.

    Raises:
        ValueError: no memory beyond the reserve, or a setting that the model cannot take.
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
    saving = {"target_rows": 1, "preserved_rows": 1, "separate_passes": True}
    saving["gradient_checkpointing"] = True
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
            more["gradient_checkpointing"] = checkpointing
            options = {**setting, **size, **more}
            plan = plan_run("eraser", model, memory_gib=memory_gib, **options)
            if not plan.fits:
                break
            found, rows = plan, 2 * rows
        if found is not None:
            return found
    return frugal
