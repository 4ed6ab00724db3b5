"""What `evaluate_forgetting` found: figures per prompt and per group, tables, a picture sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image

from diffusers_ext.evaluation.paired_figures import SIDES, KeptPair
from diffusers_ext.evaluation.report_files import SavedReport, markdown_table, number_cell, spoken
from diffusers_ext.evaluation.sheets import SheetRow, sheet_of_sides


_NOT_FIGURES = ("group", "prompt", "images")


@dataclass
class ForgettingReport(SavedReport):
    """Figures of a tuned model against its base.

    Args:
        settings: how the pictures were drawn and by what they were measured.
        drift_floor: pixel drift of the base model against itself at the same seeds, over the first
            batch. It is 0 on deterministic kernels; drift below it means nothing.
        rows: one `{"group", "prompt", "images", figure: mean}` per prompt. Figures of one side end
            in `_base` or `_tuned`.
        summary: `{group: {figure: mean over prompts}}` with groups `"preserved"`, `"held_out"` and
            `"subject"`; also the number of prompts and images, and the worst prompt's pixel drift.
        distribution: `{group: {metric: {"tuned": value, "floor": value}}}`, where asked for.
        pairs: thumbnails for the sheet; not saved.
    """

    saved: ClassVar[tuple[str, ...]] = (
        "settings", "drift_floor", "summary", "distribution", "rows",
    )  # fmt: skip
    pictures: ClassVar[str] = "pairs"

    settings: dict[str, Any]
    drift_floor: float
    rows: list[dict[str, Any]]
    summary: dict[str, dict[str, float]]
    distribution: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    pairs: list[KeptPair] = field(default_factory=list, repr=False, compare=False)

    def to_table(self, per_prompt: bool = True) -> str:
        """The figures as Markdown tables: per group, distributions, and per prompt."""
        groups = [{"group": group, **figures} for group, figures in self.summary.items()]
        parts = [_table(groups), f"Base against itself: pixel drift {self.drift_floor:.3g}."]
        distances = [
            {"group": group, "metric": name, "base to tuned": x["tuned"], "floor": x["floor"]}
            for group, metrics in self.distribution.items()
            for name, x in metrics.items()
        ]
        parts += [_table(distances, 2)] if distances else []
        parts += [_table(self.rows, 2)] if per_prompt else []
        return "\n\n".join(parts) + "\n"

    def _sheet(self) -> Image.Image:
        """One row per prompt: base and tuned side by side, for two seeds."""
        pictures: dict[tuple[str, str], list[Image.Image]] = {}
        for pair in self._kept_pictures():
            pictures.setdefault((pair.group, pair.prompt), []).extend([pair.base, pair.tuned])
        drift = {(row["group"], row["prompt"]): row["pixel_drift"] for row in self.rows}
        rows = [
            SheetRow(key[1], f"pixel drift {drift[key]:.3f}", shown, spoken(key[0]))
            for key, shown in pictures.items()
        ]
        return sheet_of_sides(rows, SIDES)


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the prompts of one group."""
    figures = [name for name in rows[0] if name not in _NOT_FIGURES]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in figures}
    counts = {"prompts": len(rows), "images": sum(row["images"] for row in rows)}
    return {**counts, **means, "worst_pixel_drift": max(row["pixel_drift"] for row in rows)}


def _table(rows: Sequence[dict[str, Any]], left: int = 1) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(name, row.get(name)) for name in names] for row in rows]
    return markdown_table([list(map(spoken, names)), *cells], left)


def _cell(name: str, value: Any) -> str:
    if value is None or isinstance(value, float):
        return number_cell(value)
    return spoken(value) if name in ("group", "metric") else str(value)
