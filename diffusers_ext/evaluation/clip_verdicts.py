"""What a judge says about clips, checked: verdicts, figures and readings by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


ClipJudge = Callable[[np.ndarray, list[str]], Mapping[str, np.ndarray]]
# Columns that every evaluation has, which no judge may name.
MEASURED = ("motion", "temporal_smoothness", "drift", "degenerate")
_KINDS = {"b": "bool", "f": "float", "U": "str"}


def judged(judge: ClipJudge, clips: np.ndarray, prompts: Sequence[str]) -> dict[str, list[Any]]:
    """Ask a judge about clips and check what it gave: `{name: one bool, float, str or None per clip}`.

    Args:
        judge: `judge(clips, prompts)` gives a dictionary of arrays `(n,)`: bool for an aspect, whether the
            clip shows what its prompt asks for in it; float for a figure, such as a distance; str for a
            reading, what is seen instead. Masked entries of a `numpy.ma` array say nothing, where a prompt
            asks for nothing in that aspect. An object with a method `correct` is asked by that.
        clips: `(n, frames, height, width, 3)` uint8.
    """
    found = getattr(judge, "correct", judge)(clips, list(prompts))
    if not isinstance(found, Mapping) or not found:
        raise ValueError(
            "`judge` must give a dictionary of arrays, one value per clip, got "
            f"{type(found).__name__} {found!r:.80}."
        )
    reserved = sorted(set(found) & set(MEASURED))
    if reserved:
        raise ValueError(f"`judge` must not use the names {list(MEASURED)}, got {reserved}.")
    return {name: _values(name, values, len(clips)) for name, values in found.items()}


def judge_facts(judge: ClipJudge) -> dict[str, Any]:
    """Name, version and further facts of a judge, of a bound method those of its object."""
    owner = getattr(judge, "__self__", judge)
    name = getattr(owner, "name", None) or getattr(owner, "__name__", type(owner).__name__)
    return {
        "name": str(name),
        "version": getattr(owner, "version", None),
        **getattr(owner, "facts", {}),
    }


def find_concept_aspect(judge: ClipJudge, given: str | None, aspects: Sequence[str]) -> str:
    """Which verdict is about the erased concept: `given`, the judge's `concept_aspect`, or its only one."""
    chosen = given or getattr(getattr(judge, "__self__", judge), "concept_aspect", None)
    if chosen is None and len(aspects) == 1:
        return aspects[0]
    if chosen not in aspects:
        raise ValueError(
            f"`concept_aspect` must be one of the judge's verdicts {list(aspects)}, got {chosen!r}."
        )
    return chosen


def _values(name: str, values: Any, count: int) -> list[Any]:
    array = np.ma.asarray(values)
    if array.shape != (count,) or array.dtype.kind not in _KINDS:
        raise ValueError(
            f"`judge` must give one bool, float or str per clip ({count}) for {name!r}, got shape "
            f"{array.shape} of {array.dtype}."
        )
    if array.dtype.kind == "f" and not np.isfinite(array.compressed()).all():
        raise ValueError(f"`judge` must give finite figures, got NaN or infinity for {name!r}.")
    return array.tolist()
