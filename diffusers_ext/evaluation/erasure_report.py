"""What `evaluate_erasure` found: rates and figures per group, tables, clips, a sheet of frames."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from diffusers_ext.evaluation.erasure_summary import ALL, BASE, summarize_group
from diffusers_ext.evaluation.report_files import (
    KeptClip,
    SavedReport,
    clip_sheet,
    markdown_table,
    number_cell,
    spoken,
    write_clip,
)

_MOST_READINGS = 4


def erasure_tables(groups: Mapping[str, Mapping[str, Any]], sides: Sequence[str], concept_aspect: str) -> str:
    """Rates, figures, readings and degenerate clips of all groups, with 95 % intervals in brackets.

    `groups` are as of `summarize_group`; the verdict `concept_aspect` is marked.
    """
    tables = [_rate_table(groups, sides, concept_aspect), _figure_table(groups, sides)]
    tables += _readings(groups, sides)
    tables += [table for table in [_degenerate_table(groups)] if len(table) > 1]
    return "\n\n".join(markdown_table(table, 2) for table in tables) + "\n"


def _rate_table(groups: Mapping[str, Mapping[str, Any]], sides: Sequence[str], concept_aspect: str) -> list[list[str]]:
    ends = [end for side in sides for end in (side, _difference(side, sides))]
    table = [["group", "seen", "clips", BASE, *ends]]
    for group, found in groups.items():
        for aspect, first in found["rates"][sides[0]].items():
            if not first["pairs"]:
                continue
            name = f"{aspect} (the concept)" if aspect == concept_aspect else aspect
            row = [spoken(group), name, str(first["pairs"])]
            row.append(_number(first["base"], first["base_interval"]))
            for side in sides:
                rate = found["rates"][side][aspect]
                row.append(_number(rate["other"], rate["other_interval"]))
                row.append(_number(rate["difference"], rate["difference_interval"]))
            table.append(row)
    return table


def _figure_table(groups: Mapping[str, Mapping[str, Any]], sides: Sequence[str]) -> list[list[str]]:
    ends = [end for side in sides for end in (side, "ratio" if len(sides) < 2 else f"{side}: ratio")]
    table = [["group", "figure", "clips", BASE, *ends]]
    for group, found in groups.items():
        for name, first in found["figures"][sides[0]].items():
            if not first["pairs"]:
                continue
            row = [spoken(group), spoken(name), str(first["pairs"]), _number(first.get("base"))]
            for side in sides:
                figure = found["figures"][side][name]
                row.append(_number(figure["other"], figure.get("other_interval")))
                row.append(_number(figure.get("ratio"), figure.get("ratio_interval")))
            table.append(row)
    return table


def _readings(groups: Mapping[str, Mapping[str, Any]], sides: Sequence[str]) -> Iterator[list[list[str]]]:
    names = dict.fromkeys(name for found in groups.values() for name in found["readings"])
    for name in names:
        table = [[f"{spoken(name)}, by group", *(f"on {side}" for side in (BASE, *sides))]]
        for group, found in groups.items():
            if name in found["readings"]:
                shares = found["readings"][name]
                table.append([spoken(group), *(_share_cell(shares[side]) for side in (BASE, *sides))])
        yield table


def _degenerate_table(groups: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Only where there is any."""
    table: list[list[str]] = []
    for group, found in groups.items():
        for side, counts in found["degenerate"].items():
            table = table or [["degenerate clips", "side", *counts, "pairs left out"]]
            if any(counts.values()):
                left_out = str(found["left_out"]) if side == BASE else "-"
                table.append([spoken(group), side, *map(str, counts.values()), left_out])
    return table


def _difference(side: str, sides: Sequence[str]) -> str:
    return "difference" if len(sides) < 2 else f"{side}: difference"


def _share_cell(shares: Mapping[str, float]) -> str:
    shown = [f"{word} {share:.1%}" for word, share in list(shares.items())[:_MOST_READINGS]]
    rest = sum(list(shares.values())[_MOST_READINGS:])
    return ", ".join([*shown, f"others {rest:.1%}"] if rest else shown) or "-"


def _number(value: float | None, interval: Sequence[float] | None = None) -> str:
    return number_cell(value, interval, ".3f")


_SLUG_LENGTH = 40


@dataclass
class ErasureReport(SavedReport):
    """Figures of clips with erasers against those of the same prompts and seeds without.

    Args:
        settings: how the clips were drawn, with which erasers, and by whom they were judged.
        groups: `{group: summary}` as of `summarize_group`. With several groups the last one, `"all"`, is of all of
            them together, without the verdict on the erased concept.
        rows: one per pair of clips, as of `measure_pairs`.
        kept: some clips; not saved with the figures.
    """

    saved: ClassVar[tuple[str, ...]] = ("settings", "groups", "rows")
    csv_name: ClassVar[str] = "clips.csv"

    settings: dict[str, Any]
    groups: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    kept: list[KeptClip] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def from_rows(
        cls, settings: dict[str, Any], rows: list[dict[str, Any]], kept: Sequence[KeptClip] = ()
    ) -> ErasureReport:
        """Summarise rows; `settings` must hold `scales` by side and `concept_aspect`."""
        sides, names = list(settings["scales"]), dict.fromkeys(row["group"] for row in rows)
        groups = {name: summarize_group([row for row in rows if row["group"] == name], sides) for name in names}
        if len(groups) > 1:
            groups[ALL] = summarize_group(rows, sides)
            for rates in groups[ALL]["rates"].values():
                # Erased here and kept there: their mixture says nothing.
                rates.pop(settings["concept_aspect"], None)
        return cls(settings, groups, rows, list(kept))

    @property
    def sides(self) -> list[str]:
        """Names of the erased sides: `"erased"`, or `"scale 0.5"`, ..."""
        return list(self.settings["scales"])

    def rate(self, group: str, aspect: str | None = None, side: str | None = None) -> float:
        """Share of a group's clips that show an aspect: the concept, on the first erased side, when `None`."""
        aspect = aspect or self.settings["concept_aspect"]
        found = self.groups[group]["rates"]
        if side == BASE:
            return found[self.sides[0]][aspect]["base"]
        return found[side or self.sides[0]][aspect]["other"]

    def to_table(self) -> str:
        """The figures as Markdown tables, with 95 % intervals in brackets."""
        return erasure_tables(self.groups, self.sides, self.settings["concept_aspect"])

    def _sheet(self) -> Image.Image:
        """One row of frames per prompt and side."""
        return clip_sheet(self.kept)

    def write_clips(self, folder: str | os.PathLike, clip_format: str = "gif", fps: int = 8) -> list[Path]:
        """Write the kept clips as `"gif"` or `"mp4"`, one file per prompt and side; gives their paths."""
        paths = []
        for number, one in enumerate(self.kept):
            words = re.sub(r"[^a-z0-9]+", "-", one.prompt.lower())[:_SLUG_LENGTH].strip("-")
            for side, clip in one.clips.items():
                name = "_".join([one.group, f"{number:02d}", words, side])
                path = Path(folder, f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.{clip_format}")
                write_clip(clip, path, fps)
                paths.append(path)
        return paths

    def save(self, folder: str | os.PathLike, clip_format: str = "gif", fps: int = 8) -> None:
        """Write `report.json`, `clips.csv`, `table.md`, and of kept clips `sheet.png` and `clips/`."""
        super().save(folder)
        self.write_clips(Path(folder, "clips"), clip_format, fps)
