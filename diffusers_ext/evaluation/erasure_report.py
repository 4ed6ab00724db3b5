"""What `evaluate_erasure` found: rates and figures per group, tables, clips, a sheet of frames."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from diffusers_ext.evaluation.paired_comparison import as_lists, bootstrap_interval, compare_rates, resampled_groups
from diffusers_ext.evaluation.report_files import (
    KeptClip,
    SavedReport,
    clip_sheet,
    interval_words,
    measured_cell,
    spoken,
    write_clip,
)
from diffusers_ext.hub import Measured
from diffusers_ext.hub.safe_markdown import markdown_table

BASE, ALL = "base", "all"
ATTACK = "attack: "  # groups of clips that were drawn to bring the concept back begin with it
BLANK = "blank"
DEGENERATE = (BLANK, "frozen", "noise")
_MOST_READINGS = 4
_SLUG_LENGTH = 40
_FORM = ".3f"  # of rates and figures


def summarize_group(rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> dict[str, Any]:
    """Rates, figures, readings and degenerate clips of one group, from the rows of `ErasureReport`.

    Pairs whose base clip is blank are left out of all but the last: nothing can be erased from them; it is an error if
    all are.
    """
    used = [row for row in rows if BLANK not in row[f"{BASE}/degenerate"].split()]
    if not used:
        raise ValueError(
            f"`pipeline` must draw clips, got blank ones only for the {len(rows)} of group "
            f"{rows[0]['group']!r} without erasers. Use float32 or bfloat16."
        )
    names = [key.removeprefix(f"{BASE}/") for key in used[0] if key.startswith(f"{BASE}/")]
    names.remove("degenerate")
    kinds = {name: _kind(used, name) for name in names}
    aspects, figures, readings = ([name for name in names if kinds[name] is kind] for kind in (bool, float, str))
    return {
        "clips": len(used),
        "left_out": len(rows) - len(used),
        "prompts": len({row["prompt"] for row in used}),
        "rates": {side: {name: _rates(used, name, side) for name in aspects} for side in sides},
        "figures": {
            side: {**{name: _figures(used, name, side) for name in figures}, "drift": _drift(used, side)}
            for side in sides
        },
        "readings": {name: {side: _shares(used, f"{side}/{name}") for side in (BASE, *sides)} for name in readings},
        "degenerate": {side: _degenerate(rows, side) for side in (BASE, *sides)},
    }


def _kind(rows: Sequence[dict[str, Any]], name: str) -> type | None:
    """Of a column's values; `None` where there is none."""
    found = (row[f"{BASE}/{name}"] for row in rows)
    return next((type(value) for value in found if value is not None), None)


def _pairs(
    rows: Sequence[dict[str, Any]], name: str, side: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Values of the base and of a side, where both have one, and which of them are resampled together."""
    keys = f"{BASE}/{name}", f"{side}/{name}"
    rows = [row for row in rows if all(row[key] is not None for key in keys)]
    base, other = (torch.tensor([row[key] for row in rows], dtype=dtype) for key in keys)
    return base, other, resampled_groups(rows) if rows else None


def _rates(rows: Sequence[dict[str, Any]], name: str, side: str) -> dict[str, Any]:
    base, other, groups = _pairs(rows, name, side, torch.bool)
    return as_lists(compare_rates(base, other, groups=groups)._asdict()) if len(base) else {"pairs": 0}


def _figures(rows: Sequence[dict[str, Any]], name: str, side: str) -> dict[str, Any]:
    base, other, groups = _pairs(rows, name, side, torch.float64)
    if not len(base):
        return {"pairs": 0}
    found: dict[str, Any] = {
        "pairs": len(base),
        "base": base.mean().item(),
        "other": other.mean().item(),
        "difference": (other - base).mean().item(),
        "difference_interval": bootstrap_interval(other - base, groups=groups),
    }
    if (base > 0).all():
        found["ratio"] = found["other"] / found["base"]
        found["ratio_interval"] = bootstrap_interval(other, base, groups=groups)
    return as_lists(found)


def _drift(rows: Sequence[dict[str, Any]], side: str) -> dict[str, Any]:
    drift = torch.tensor([row[f"{side}/drift"] for row in rows], dtype=torch.float64)
    interval = bootstrap_interval(drift, groups=resampled_groups(rows))
    return {"pairs": len(rows), "other": drift.mean().item(), "other_interval": list(interval)}


def _shares(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """Share of every reading, the most frequent first."""
    counts = Counter(row[key] for row in rows if row[key] is not None)
    total = sum(counts.values())
    return {word: count / total for word, count in counts.most_common()}


def _degenerate(rows: Sequence[dict[str, Any]], side: str) -> dict[str, int]:
    found = Counter(kind for row in rows for kind in row[f"{side}/degenerate"].split())
    return {kind: found[kind] for kind in DEGENERATE}


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
        # What an attack breaks is no fault of the erasers.
        usual = [row for row in rows if not row["group"].startswith(ATTACK)]
        if len(groups) > 1:
            groups[ALL] = summarize_group(usual, sides)
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

    def measured(self) -> Iterator[Measured]:
        """What a model card shows."""
        for group, summary in self.groups.items():
            for side, aspects in summary["rates"].items():
                for aspect, found in aspects.items():
                    if not found["pairs"]:
                        continue
                    notes = (
                        f"{found['base']:.3g} without the eraser; {found['pairs']} clips; "
                        f"{interval_words(found['other_interval'])}"
                    )
                    metric = f"share of clips that show {aspect}, {side}"
                    yield Measured(f"{group} prompts", metric, found["other"], notes=notes)

    def to_table(self) -> str:
        """Rates, figures, readings and degenerate clips as Markdown tables, with 95 % intervals in brackets."""
        concept = self.settings["concept_aspect"]
        tables = [
            self._comparison("seen", "rates", "difference", lambda x: f"{x} (the concept)" if x == concept else x),
            self._comparison("figure", "figures", "ratio", spoken),
            *self._readings(),
            self._degenerate_clips(),
        ]
        found = [self._attacks(), *(markdown_table(table, 2) for table in tables if table)]
        return "\n\n".join(part for part in found if part) + "\n"

    def _attacks(self) -> str:
        """How often the concept is seen under each attack, the worst first, and what was not tried; maybe empty."""
        missing = "\n".join(f"- {words}" for words in self.settings.get("not_covered", ()))
        groups = [group for group in self.groups if group.startswith(ATTACK)]
        if not groups:
            return ""
        concept, side = self.settings["concept_aspect"], self.sides[0]
        found = {group: self.groups[group]["rates"][side].get(concept, {"pairs": 0}) for group in ("target", *groups)}
        asked = {group: rate for group, rate in found.items() if rate["pairs"]}
        rows = [
            [spoken(group), str(rate["pairs"]), *(measured_cell(rate, key, _FORM) for key in ("base", "other"))]
            for group, rate in sorted(asked.items(), key=lambda one: -one[1]["other"])
        ]
        table = markdown_table([["concept seen", "clips", BASE, side], *rows], 2)
        return "\n\n".join([table, *(["Not covered by these attacks:", missing] if missing else [])])

    def _comparison(self, heading: str, kind: str, change: str, label: Callable[[str], str]) -> list[list[str]]:
        """All rates or figures, and how far each side is from the base."""
        ends = [end for side in self.sides for end in (side, change if len(self.sides) < 2 else f"{side}: {change}")]
        table = [["group", heading, "clips", BASE, *ends]]
        for group, summary in self.groups.items():
            for name, first in summary[kind][self.sides[0]].items():
                if first["pairs"]:
                    row = [spoken(group), label(name), str(first["pairs"]), measured_cell(first, "base", _FORM)]
                    for side in self.sides:
                        row += [measured_cell(summary[kind][side][name], key, _FORM) for key in ("other", change)]
                    table.append(row)
        return table

    def _readings(self) -> Iterator[list[list[str]]]:
        sides = (BASE, *self.sides)
        for name in dict.fromkeys(name for summary in self.groups.values() for name in summary["readings"]):
            table = [[f"{spoken(name)}, by group", *(f"on {side}" for side in sides)]]
            for group, summary in self.groups.items():
                if name in summary["readings"]:
                    shares = summary["readings"][name]
                    table.append([spoken(group), *(_share_cell(shares[side]) for side in sides)])
            yield table

    def _degenerate_clips(self) -> list[list[str]]:
        """Empty where there are none."""
        rows = [
            [spoken(group), side, *map(str, counts.values()), str(summary["left_out"]) if side == BASE else "-"]
            for group, summary in self.groups.items()
            for side, counts in summary["degenerate"].items()
            if any(counts.values())
        ]
        return [["degenerate clips", "side", *DEGENERATE, "pairs left out"], *rows] if rows else []

    def _sheet(self) -> Image.Image:
        """One row of frames per prompt and side."""
        return clip_sheet(self.kept)

    def write_clips(self, folder: str | os.PathLike, clip_format: str = "gif", fps: int = 8) -> list[Path]:
        """Write the kept clips as `"gif"` or `"mp4"`, pictures as png, a file per prompt and side; gives the paths."""
        paths = []
        for number, one in enumerate(self.kept):
            words = re.sub(r"[^a-z0-9]+", "-", one.prompt.lower())[:_SLUG_LENGTH].strip("-")
            for side, clip in one.clips.items():
                name = "_".join([one.group, f"{number:02d}", words, side])
                ending = clip_format if len(clip) > 1 else "png"
                path = Path(folder, f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.{ending}")
                write_clip(clip, path, fps)
                paths.append(path)
        return paths

    def save(self, folder: str | os.PathLike, clip_format: str = "gif", fps: int = 8) -> None:
        """Write `report.json`, `clips.csv`, `table.md`, and of kept clips `sheet.png` and `clips/`."""
        super().save(folder)
        self.write_clips(Path(folder, "clips"), clip_format, fps)


def _share_cell(shares: Mapping[str, float]) -> str:
    shown = [f"{word} {share:.1%}" for word, share in list(shares.items())[:_MOST_READINGS]]
    rest = sum(list(shares.values())[_MOST_READINGS:])
    return ", ".join([*shown, f"others {rest:.1%}"] if rest else shown) or "-"
