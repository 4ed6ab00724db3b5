"""What `evaluate_golden_noise` found: tables, one row per picture, a picture sheet."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from diffusers_ext.evaluation.noise_figures import STANDARD, KeptPictures
from diffusers_ext.evaluation.picture_sheet import SheetRow, picture_sheet
from diffusers_ext.evaluation.report_files import SavedReport, write_rows


_MEBIBYTE = 2**20


@dataclass
class GoldenNoiseReport(SavedReport):
    """Figures of golden noise against standard noise from the same seeds.

    Args:
        settings: how the pictures were drawn, by which models, and by what they were judged.
        scores: `{side: {reward: PairedComparison}}` against the standard side; sides are the
            golden ones and `"best of N"`.
        best_of: as of `best_of_summary`; empty where it was left out.
        noise: `{side: {statistic: mean over pictures}}`; `change` is the norm of what was added
            relative to the noise, `spectrum` the power per ring of frequency.
        diversity: `{side: {"distance", "ratio", "ratio_interval"}}`.
        cost: as of `cost_summary`.
        rows: one per picture: prompt, index, seed, `side/reward` and `side/noise_statistic`.
        kept: thumbnails for the sheet; not saved.
    """

    saved: ClassVar[tuple[str, ...]] = (
        "settings",
        "scores",
        "best_of",
        "noise",
        "diversity",
        "cost",
        "rows",
    )

    settings: dict[str, Any]
    scores: dict[str, dict[str, dict[str, Any]]]
    best_of: dict[str, Any]
    noise: dict[str, dict[str, Any]]
    diversity: dict[str, dict[str, Any]]
    cost: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    kept: list[KeptPictures] = field(default_factory=list, repr=False, compare=False)

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write one row per picture."""
        write_rows(path, self.rows)

    def to_table(self) -> str:
        """The figures as Markdown tables, with 95 % intervals in brackets."""
        return "\n\n".join(_markdown(table) for table in self._tables()) + "\n"

    def _tables(self) -> Iterator[list[list[str]]]:
        for label in self.settings["rewards"]:
            yield self._score_table(label)
        if self.best_of:
            yield self._best_of_table()
        names = ["mean", "std", "kurtosis", "lag1_correlation", "change"]
        yield [["noise", *(name.replace("_", " ") for name in names), "power by frequency"]] + [
            [side, *(_number(found.get(name)) for name in names), _numbers(found["spectrum"])]
            for side, found in self.noise.items()
        ]
        if self.diversity:
            yield [["diversity over seeds", "distance", "ratio"]] + [
                [side, _number(x["distance"]), _number(x["ratio"], x["ratio_interval"])]
                for side, x in self.diversity.items()
            ]
        yield self._cost_table()

    def _score_table(self, label: str) -> list[list[str]]:
        first = next(iter(self.scores.values()))[label]
        return [
            [label, "mean", "difference", "win rate", "ties"],
            [STANDARD, _number(first["mean_standard"]), "-", "-", "-"],
        ] + [
            [
                side,
                _number(found[label]["mean_other"]),
                _number(found[label]["difference"], found[label]["difference_interval"]),
                _number(found[label]["win_rate"], found[label]["win_rate_interval"]),
                str(found[label]["ties"]),
            ]
            for side, found in self.scores.items()
        ]

    def _best_of_table(self) -> list[list[str]]:
        count = self.best_of["count"]
        return [
            [f"against best of {count}", "time ratio", "difference", "win rate",
             "best of n at equal time", "n that is as good"]
        ] + [
            [
                subject,
                _number(found["time_ratio"]),
                _number(found["difference"], found["difference_interval"]),
                _number(found["win_rate"], found["win_rate_interval"]),
                f"{_number(found['equal_time_mean'])} (n = {found['equal_time_count']})",
                str(found["matching_count"] or f"more than {count}"),
            ]
            for subject, found in self.best_of["against"].items()
        ]  # fmt: skip

    def _cost_table(self) -> list[list[str]]:
        table = [["cost", "s a picture", "s extra", "share extra", "weights MiB", "memory MiB"]]
        for side, found in self.cost.items():
            if side == "score":
                table.append(["scoring", _number(found["seconds"]), *["-"] * 4])
                continue
            seconds = [_number(found[n]) for n in ("seconds", "extra_seconds", "extra_share")]
            memory = found["peak_memory_bytes"]
            sizes = [found["parameter_bytes"] / _MEBIBYTE, memory and memory / _MEBIBYTE]
            table.append([side, *seconds, *map(_number, sizes)])
        if self.best_of:
            name = f"best of {self.best_of['count']}"
            table.append([name, _number(self.best_of["seconds"][-1]), *["-"] * 4])
        return table

    def picture_sheet(self, path: str | os.PathLike) -> None:
        """Write a picture with one row per prompt: all sides side by side, for two seeds."""
        if not self.kept:
            raise ValueError(
                "`kept` must hold pictures to draw a sheet, got none. They are not saved with the "
                "report, and `sheet_prompts=0` keeps none."
            )
        by_prompt: dict[str, list[KeptPictures]] = {}
        for kept in self.kept:
            by_prompt.setdefault(kept.prompt, []).append(kept)
        sides = list(self.kept[0].pictures)
        rows = [
            SheetRow(prompt, _note(found), [k.pictures[side] for k in found for side in sides])
            for prompt, found in by_prompt.items()
        ]
        columns = sides * (max(len(row.pictures) for row in rows) // len(sides))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture_sheet(rows, columns, pairs=len(sides)).save(path)


def _note(found: Sequence[KeptPictures]) -> str:
    """The first reward's scores, one line a seed."""
    return "\n".join(" | ".join(f"{score:.3f}" for score in kept.scores.values()) for kept in found)


def _markdown(table: list[list[str]]) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    rule = "|---" + "|---:" * (len(table[0]) - 1) + "|"
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], rule, *lines[1:]])


def _number(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}"
    return text if interval is None else f"{text} [{interval[0]:.4g}, {interval[1]:.4g}]"


def _numbers(values: Sequence[float | None]) -> str:
    return " ".join("-" if value is None else f"{value:.2f}" for value in values)
