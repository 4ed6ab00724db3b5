"""A plan as people read it: aligned columns, units that fit the numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

_LINE = 88
_SIZES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_TIMES = ((86400, "d"), (3600, "h"), (60, "min"))
_TITLES = {
    "nullspace": "null-space DreamBooth",
    "golden-noise": "golden noise",
    "guard": "guard of golden noise",
    "eraser": "eraser",
    "edit": "edit",
}


def size_text(size: int) -> str:
    """Bytes in the unit that leaves a readable number, such as `"1.50 GiB"`."""
    for unit, name in _SIZES:
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"


def time_text(seconds: float | None) -> str:
    """Seconds in the unit that leaves a readable number; a dash for `None`."""
    if seconds is None:
        return "-"
    for unit, name in _TIMES:
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.2f} ms"


def plan_text(facts: Mapping[str, Any]) -> str:
    """The whole plan, of `RunPlan.to_dict`: aligned columns, units that fit the numbers."""
    phases = [
        [
            phase["name"],
            size_text(phase["peak"]) + (" *" if phase["name"] == facts["worst_phase"] else "  "),
            time_text(phase["seconds"]),
        ]
        for phase in facts["phases"]
    ]
    phases.append(["all phases", size_text(facts["peak"]) + "  ", time_text(facts["seconds"])])
    where = "" if facts["device"] is None else f" on {facts['device']}"
    disk = {**facts["disk"], "written by the run": facts["disk_total"]}
    disk["download of the base model"] = facts["download"]
    blocks = [
        f"Plan: {_TITLES[facts['tool']]} with {facts['model']}{where}",
        _verdict(facts),
        _setting(facts["setting"]),
        _columns(["memory by part", ""], [[k, size_text(v)] for k, v in facts["parts"].items()]),
        _columns(["phase", "peak memory  ", "time"], phases),
        _columns(["disk", ""], [[k, size_text(v)] for k, v in disk.items()]),
    ]
    if facts["assumptions"]:
        fill = partial(textwrap.fill, width=_LINE, initial_indent="- ", subsequent_indent="  ")
        blocks.append("\n".join(["Assumed, not measured:", *map(fill, facts["assumptions"])]))
    return "\n\n".join(blocks)


def _verdict(facts: Mapping[str, Any]) -> str:
    peak = f"peak {size_text(facts['peak'])} while {facts['worst_phase']}"
    if facts["fits"] is None:
        return f"Name a GPU or its memory to see whether it fits: {peak}."
    room = f"{size_text(facts['memory'])}, {size_text(facts['reserve'])} of it in reserve"
    if facts["fits"]:
        return f"Fits: {peak}, of {room}."
    return f"Does not fit: {peak}, {size_text(facts['missing'])} more than there is ({room})."


def _setting(setting: Mapping[str, Any]) -> str:
    given = [f"{name} {_value(value)}" for name, value in setting.items() if value is not None]
    return textwrap.fill("Setting: " + ", ".join(given), _LINE, break_on_hyphens=False)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} {_value(v)}" for k, v in value.items()) + "}"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines with the first column to the left and the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
