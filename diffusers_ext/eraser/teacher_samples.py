"""Samples of an eraser's training: points of the frozen model's runs with its velocities there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch.utils.data import Dataset


PARTS = ("target", "preserved")
EMPTY_PROMPT = -1
Row = dict[str, torch.Tensor]


class SampleRows(Protocol):
    """The rows of one part, wherever they are kept; a row has no batch axis."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class TensorRows:
    """Rows in memory, given run by run as `{name: (points, ...)}`."""

    def __init__(self, runs: Sequence[Row]) -> None:
        self.columns = {name: torch.cat([run[name] for run in runs]) for name in runs[0]}

    def __len__(self) -> int:
        return len(self.columns["t"])

    def __getitem__(self, index: int) -> Row:
        return {name: column[index] for name, column in self.columns.items()}


class TeacherSamples(Dataset):
    """What an eraser is trained on.

    Item `i` is `{"target": row, "preserved": row}`, row `i` modulo the rows of each part; a part
    without rows is left out. Rows are float32 but for the two indices:

    - `"target"`: `x_t` `(frames, channels, height, width)`, `t`, `prompt` (index of the target prompt
      and of its anchor), `v_concept` and `v_anchor` (the frozen model's velocities of the two), and
      `mask` `(frames', rows, columns)` in [0, 1] where masks were asked for.
    - `"preserved"`: `x_t`, `t`, `prompt` (index of the preserved prompt, -1 for the empty prompt) and
      `velocity`.

    Attributes:
        parts: the rows of each part.
        head_weights: `(layers, heads)` with which the masks were made, if there are any.
    """

    def __init__(
        self, parts: Mapping[str, SampleRows], head_weights: torch.Tensor | None = None
    ) -> None:
        self.head_weights = head_weights
        self.parts = {name: rows for name, rows in parts.items() if len(rows)}
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ValueError(f"`parts` must have rows, of {PARTS} only, got {sorted(self.parts)}.")

    def __len__(self) -> int:
        return max(len(rows) for rows in self.parts.values())

    def __getitem__(self, index: int) -> dict[str, Row]:
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be from 0 to {len(self) - 1}, got {index}.")
        rows = {name: rows[index % len(rows)] for name, rows in self.parts.items()}
        return {name: _cast(row, torch.float32) for name, row in rows.items()}


class TeacherMemory:
    """The runs of one collection in memory; `TeacherFiles` keeps them in a folder."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._runs: dict[str, list[Row]] = {part: [] for part in PARTS}
        self._head_weights: torch.Tensor | None = None

    def has(self, part: str, run: int) -> bool:
        """Whether a run is there: never, it is not made twice."""
        return False

    def write(self, part: str, run: int, rows: Row) -> None:
        """Keep the rows of one run; raises `ValueError` where they are not finite."""
        self._runs[part].append(to_storage(rows, self.dtype))

    def head_weights(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The weights that all runs here are made with."""
        self._head_weights = make()
        return self._head_weights

    def samples(self) -> TeacherSamples:
        """All that was kept."""
        parts = {part: TensorRows(runs) if runs else [] for part, runs in self._runs.items()}
        return TeacherSamples(parts, self._head_weights)


def to_storage(rows: Row, dtype: torch.dtype) -> Row:
    """Rows `{name: (points, ...)}`, the floating-point ones in the dtype in which they are kept.

    Raises:
        ValueError: values that are not finite in `dtype`.
    """
    stored = {name: value.contiguous() for name, value in _cast(rows, dtype).items()}
    for name, value in stored.items():
        if not value.isfinite().all():
            prompt = rows["prompt"][~value.flatten(1).isfinite().all(1)][0]
            raise ValueError(
                f"`{name}` must be finite, got NaN or infinity for prompt {int(prompt)}. Run the "
                "model in bfloat16 or float32."
            )
    return stored


def _cast(rows: Row, dtype: torch.dtype) -> Row:
    return {n: value.to(dtype) if value.is_floating_point() else value for n, value in rows.items()}
