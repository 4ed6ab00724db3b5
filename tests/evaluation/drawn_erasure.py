"""Rows of an evaluation of erasers, as if clips had been drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def rows_of(
    group: str,
    count: int,
    erased: Callable[[int], dict[str, Any]] = lambda index: {},
    base: Callable[[int], dict[str, Any]] = lambda index: {},
    prompts: int | None = None,
) -> list[dict[str, Any]]:
    """`count` pairs of `prompts` prompts; all is seen, nothing moves differently, unless said."""
    rows = []
    for index in range(count):
        side = {"digit": True, "color": True, "reads_as": "seven", "motion": 0.5, "degenerate": ""}
        row = {"group": group, "prompt": f"{group} {index % (prompts or count)}", "index": index}
        found = {"base": {**side, **base(index)}, "erased": {**side, "drift": 0.0, **erased(index)}}
        row.update({f"{s}/{name}": x for s, values in found.items() for name, x in values.items()})
        rows.append(row)
    return rows
