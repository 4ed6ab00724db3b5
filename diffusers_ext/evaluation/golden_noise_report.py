"""What `evaluate_golden_noise` found: tables, one row per picture, a picture sheet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image

from diffusers_ext.evaluation.noise_summary import STANDARD, KeptPictures, best_of_name
from diffusers_ext.evaluation.report_files import (
    SavedReport,
    SheetRow,
    interval_words,
    measured_cell,
    number_cell,
    sheet_of_sides,
    spoken,
)
from diffusers_ext.hub import Measured
from diffusers_ext.hub.safe_markdown import markdown_table

_MEBIBYTE = 2**20


@dataclass
class GoldenNoiseReport(SavedReport):
    """Figures of golden noise against standard noise from the same seeds.

    Args:
        settings: how the pictures were drawn, by which models, and by what they were judged.
        scores: `{side: {reward: PairedComparison}}` against the standard side; sides are the golden ones and `"best of
            N"`.
        best_of: as of `best_of_summary`; empty where it was left out.
        noise: `{side: {statistic: mean over pictures}}`; `change` is the norm of what was added relative to the noise,
            `spectrum` the power per ring of frequency.
        diversity: `{side: {"distance", "ratio", "ratio_interval"}}`.
        cost: as of `cost_summary`.
        rows: one per picture: prompt, index, seed, `side/reward` and `side/noise_statistic`.
        kept: thumbnails for the sheet; not saved.
    """

    saved: ClassVar[tuple[str, ...]] = ("settings", "scores", "best_of", "noise", "diversity", "cost", "rows")
    csv_name: ClassVar[str] = "pictures.csv"

    settings: dict[str, Any]
    scores: dict[str, dict[str, dict[str, Any]]]
    best_of: dict[str, Any]
    noise: dict[str, dict[str, Any]]
    diversity: dict[str, dict[str, Any]]
    cost: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    kept: list[KeptPictures] = field(default_factory=list, repr=False, compare=False)

    def measured(self) -> Iterator[Measured]:
        """What a model card shows."""
        for side, rewards in self.scores.items():
            for reward, found in rewards.items():
                for name in ("difference", "win_rate"):
                    yield Measured(
                        f"{found['pairs']} pictures from the same noise",
                        f"{reward}, {spoken(name)} of {side} to standard noise",
                        found[name],
                        notes=interval_words(found[f"{name}_interval"]),
                    )

    def to_table(self) -> str:
        """The figures as Markdown tables, with 95 % intervals in brackets."""
        return "\n\n".join(markdown_table(table) for table in self._tables()) + "\n"

    def _tables(self) -> Iterator[list[list[str]]]:
        for label in self.settings["rewards"]:
            yield self._score_table(label)
        if self.best_of:
            yield self._best_of_table()
        names = ["mean", "std", "kurtosis", "lag1_correlation", "change"]
        yield [["noise", *map(spoken, names), "power by frequency"]] + [
            [
                side,
                *(number_cell(found.get(name)) for name in names),
                " ".join(number_cell(power, form=".2f") for power in found["spectrum"]),
            ]
            for side, found in self.noise.items()
        ]
        if self.diversity:
            yield [["diversity over seeds", "distance", "ratio"]] + [
                [side, measured_cell(found, "distance"), measured_cell(found, "ratio")]
                for side, found in self.diversity.items()
            ]
        yield self._cost_table()

    def _score_table(self, label: str) -> list[list[str]]:
        found = {side: rewards[label] for side, rewards in self.scores.items()}
        first = next(iter(found.values()))
        table = [
            [label, "mean", "difference", "win rate", "ties"],
            [STANDARD, measured_cell(first, "mean_standard"), "-", "-", "-"],
        ]
        for side, x in found.items():
            cells = [measured_cell(x, name) for name in ("mean_other", "difference", "win_rate")]
            table.append([side, *cells, str(x["ties"])])
        return table

    def _best_of_table(self) -> list[list[str]]:
        count = self.best_of["count"]
        table = [
            [f"against best of {count}", "time ratio", "difference", "win rate",
             "best of n at equal time", "n that is as good"]
        ]  # fmt: skip
        for subject, found in self.best_of["against"].items():
            cells = [measured_cell(found, name) for name in ("time_ratio", "difference", "win_rate")]
            cells.append(f"{measured_cell(found, 'equal_time_mean')} (n = {found['equal_time_count']})")
            table.append([subject, *cells, str(found["matching_count"] or f"more than {count}")])
        return table

    def _cost_table(self) -> list[list[str]]:
        table = [["cost", "s a picture", "s extra", "share extra", "weights MiB", "memory MiB"]]
        for side, found in self.cost.items():
            if side == "score":
                table.append(["scoring", number_cell(found["seconds"]), *["-"] * 4])
                continue
            seconds = [found[name] for name in ("seconds", "extra_seconds", "extra_share")]
            memory = found["peak_memory_bytes"]
            sizes = [found["parameter_bytes"] / _MEBIBYTE, memory and memory / _MEBIBYTE]
            table.append([side, *map(number_cell, [*seconds, *sizes])])
        if self.best_of:
            name = best_of_name(self.best_of["count"])
            table.append([name, number_cell(self.best_of["seconds"][-1]), *["-"] * 4])
        return table

    def _sheet(self) -> Image.Image:
        """One row per prompt: all sides side by side, for two seeds, with the first reward's scores."""
        by_prompt: dict[str, list[KeptPictures]] = {}
        for kept in self._kept_pictures():
            by_prompt.setdefault(kept.prompt, []).append(kept)
        sides = list(self.kept[0].pictures)
        rows = [
            SheetRow(
                prompt,
                "\n".join(" | ".join(f"{x:.3f}" for x in kept.scores.values()) for kept in found),
                [kept.pictures[side] for kept in found for side in sides],
            )
            for prompt, found in by_prompt.items()
        ]
        return sheet_of_sides(rows, sides)
