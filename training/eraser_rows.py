"""What the student of an eraser's training is asked: prompts, states, velocities to reach."""

from __future__ import annotations

from typing import NamedTuple

import torch


class EraserText(NamedTuple):
    """Embeddings of all prompts, each `(prompts, text, dim)`; the empty prompt's is `(text, dim)`."""

    target: torch.Tensor
    anchor: torch.Tensor
    preserved: torch.Tensor
    empty: torch.Tensor


class Rows(NamedTuple):
    """What the student is asked in one pass: target rows first, preserved rows after them.

    Attributes:
        x_t: `(rows, frames, channels, height, width)` float32.
        t: `(rows,)`.
        prompt_embeds: `(rows, text, dim)`.
        wanted: velocities to reach, as `x_t`.
        unerased: the teacher's velocities for target rows.
        weights: `(rows,)`, how much each counts.
        mask: of the concept, `(target rows, frames, rows, columns)` in [0, 1], or `None`.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    prompt_embeds: torch.Tensor
    wanted: torch.Tensor
    unerased: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor | None

    @property
    def num_target(self) -> int:
        """How many rows are target rows."""
        return len(self.unerased)


class States(NamedTuple):
    """Where velocities are asked for: x_t, timesteps and numbers of prompts, one entry a row."""

    x_t: torch.Tensor
    t: torch.Tensor
    prompts: torch.Tensor


class TeacherRows(NamedTuple):
    """States and what the teacher says there.

    Attributes:
        target, preserved: states of each kind; the preserved prompt -1 is the empty one.
        v_concept, v_anchor: the teacher's velocities at target states.
        v_preserved: its velocities at preserved states.
        mask: of the concept, `(target rows, frames, rows, columns)` in [0, 1], or `None`.
    """

    target: States
    preserved: States
    v_concept: torch.Tensor
    v_anchor: torch.Tensor
    v_preserved: torch.Tensor
    mask: torch.Tensor | None


def rows_of_each_kind(batch_size: int, preserved_share: float) -> tuple[int, int]:
    """Target and preserved rows taken of a batch that has `batch_size` of each.

    Of the kind with the larger share all are taken; of the other as many as its share leaves, at
    least one unless its share is 0.
    """
    larger = max(preserved_share, 1 - preserved_share)
    smaller = round(batch_size * (1 - larger) / larger)
    if larger < 1:
        smaller = max(1, smaller)
    return (batch_size, smaller) if preserved_share <= 0.5 else (smaller, batch_size)
