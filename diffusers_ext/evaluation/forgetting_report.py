"""What `evaluate_forgetting` found: figures per prompt and per group, tables, a picture sheet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from diffusers_ext.evaluation.paired_figures import KeptPair
from diffusers_ext.evaluation.picture_sheet import SheetRow, picture_sheet
from diffusers_ext.evaluation.report_files import SavedReport


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
        "settings",
        "drift_floor",
        "summary",
        "distribution",
        "rows",
    )

    settings: dict[str, Any]
    drift_floor: float
    rows: list[dict[str, Any]]
    summary: dict[str, dict[str, float]]
    distribution: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    pairs: list[KeptPair] = field(default_factory=list, repr=False, compare=False)

    def to_table(self, per_prompt: bool = True) -> str:
        """The figures as Markdown tables: per group, distributions, and per prompt."""
        groups = [{"group": group, **figures} for group, figures in self.summary.items()]
        parts = [_markdown(groups), f"Base against itself: pixel drift {self.drift_floor:.3g}."]
        distances = [
            {
                "group": group,
                "metric": metric,
                "base to tuned": found["tuned"],
                "floor": found["floor"],
            }
            for group, metrics in self.distribution.items()
            for metric, found in metrics.items()
        ]
        parts += [_markdown(distances)] if distances else []
        parts += [_markdown(self.rows)] if per_prompt else []
        return "\n\n".join(parts) + "\n"

    def picture_sheet(self, path: str | os.PathLike) -> None:
        """Write a picture with one row per prompt: base and tuned side by side, for two seeds."""
        if not self.pairs:
            raise ValueError(
                "`pairs` must hold pictures to draw a sheet, got none. They are not saved with the "
                "report, and `sheet_prompts=0` keeps none."
            )
        figures = {(row["group"], row["prompt"]): row for row in self.rows}
        pictures: dict[tuple[str, str], list] = {}
        for pair in self.pairs:
            pictures.setdefault((pair.group, pair.prompt), []).extend([pair.base, pair.tuned])
        rows = [
            SheetRow(
                key[1], f"pixel drift {figures[key]['pixel_drift']:.3f}", shown, _title(key[0])
            )
            for key, shown in pictures.items()
        ]
        columns = ["base", "tuned"] * (max(len(row.pictures) for row in rows) // 2)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture_sheet(rows, columns).save(path)


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the prompts of one group."""
    figures = [name for name in rows[0] if name not in _NOT_FIGURES]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in figures}
    counts = {"prompts": len(rows), "images": sum(row["images"] for row in rows)}
    return {**counts, **means, "worst_pixel_drift": max(row["pixel_drift"] for row in rows)}


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(_title(name) for name in names) + " |"]
    lines.append(
        "|"
        + "|".join("---" if name in ("group", "prompt", "metric") else "---:" for name in names)
        + "|"
    )
    lines += [
        "| " + " | ".join(_cell(name, row.get(name)) for name in names) + " |" for row in rows
    ]
    return "\n".join(lines)


def _title(name: str) -> str:
    return name.replace("_", " ")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if name in ("group", "metric"):
        return _title(value)
    # A prompt may hold what would end a cell or a row.
    return " ".join(str(value).replace("|", "\\|").split())
