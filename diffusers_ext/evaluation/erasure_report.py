"""What `evaluate_erasure` found: rates and figures per group, tables, clips, a sheet of frames."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image

from diffusers_ext.evaluation.noise_summary import resampled_groups
from diffusers_ext.evaluation.paired_comparison import (
    Interval,
    as_lists,
    bootstrap_interval,
    effective_count,
    wilson_interval,
)
from diffusers_ext.evaluation.report_files import (
    KeptClip,
    SavedReport,
    clip_sheet,
    markdown_table,
    number_cell,
    spoken,
    write_clip,
)


class RateComparison(NamedTuple):
    """How often something is seen on the base's and on the other side of the same pairs."""

    pairs: int
    base: float
    base_interval: Interval
    other: float
    other_interval: Interval
    difference: float  # other - base
    difference_interval: Interval


def compare_rates(
    base: torch.Tensor, other: torch.Tensor, *, groups: torch.Tensor | None = None, confidence: float = 0.95
) -> RateComparison:
    """Compare the rates of paired verdicts, `(pairs,)` bool.

    The intervals are Wilson's for the rates and Newcombe's for their difference, which stay open where all verdicts
    agree; a bootstrap would call such a difference certain, however few the pairs. Pairs of one of the `groups`
    (integers) may be alike, and the intervals count as many pairs as the groups are worth (`effective_count`).
    """
    for name, values in (("base", base), ("other", other)):
        if values.dtype != torch.bool or values.ndim != 1 or not len(values):
            raise ValueError(f"`{name}` must be (pairs,) bool, got {tuple(values.shape)} {values.dtype}.")
    if base.shape != other.shape:
        raise ValueError(f"`other` must hold one verdict per pair ({len(base)}), got {len(other)}.")
    first, second = base.double(), other.double()
    counts = [float(len(base))] * 3
    if groups is not None:
        counts = [effective_count(values, groups) for values in (first, second, second - first)]
    rates = first.mean().item(), second.mean().item()
    return RateComparison(
        len(base),
        rates[0],
        wilson_interval(rates[0], counts[0], confidence),
        rates[1],
        wilson_interval(rates[1], counts[1], confidence),
        (second - first).mean().item(),
        _newcombe_interval(base, other, counts[2], confidence),
    )


def _newcombe_interval(base: torch.Tensor, other: torch.Tensor, count: float, confidence: float) -> Interval:
    """Newcombe's interval of a difference of paired rates (Stat. Med. 17, 2635, 1998, method 10).

    With the Wilson intervals `(l, u)` of both rates `p` and the correlation `phi` of the verdicts, the lower limit is
    `d - sqrt(a^2 - 2 phi a b + b^2)` where `a = p2 - l2` and `b = u1 - p1`; the upper one mirrors it.
    """
    share = count / len(base)  # pairs of one prompt count for less
    both, neither = ((base & other).sum() * share, (~base & ~other).sum() * share)
    only_base, only_other = ((base & ~other).sum() * share, (~base & other).sum() * share)
    margins = (both + only_base) * (only_other + neither) * (both + only_other) * (only_base + neither)
    product = (both * neither - only_base * only_other).item()
    if product > 0:
        product = max(product - count / 2, 0.0)  # the continuity correction
    phi = product / math.sqrt(margins.item()) if margins > 0 else 0.0
    first, second = base.double().mean().item(), other.double().mean().item()
    low1, high1 = wilson_interval(first, count, confidence)
    low2, high2 = wilson_interval(second, count, confidence)
    difference = (other.double() - base.double()).mean().item()
    return Interval(
        difference - _combined(second - low2, high1 - first, phi),
        difference + _combined(high2 - second, first - low1, phi),
    )


def _combined(first: float, second: float, phi: float) -> float:
    return math.sqrt(max(0.0, first**2 - 2 * phi * first * second + second**2))


BASE, ALL = "base", "all"
BLANK = "blank"
DEGENERATE = (BLANK, "frozen", "noise")


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
    names = [name for name in names if name != "degenerate"]
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


def _rates(rows: Sequence[dict[str, Any]], name: str, side: str) -> dict[str, Any]:
    keys = f"{BASE}/{name}", f"{side}/{name}"
    rows = [row for row in rows if all(row[key] is not None for key in keys)]
    if not rows:
        return {"pairs": 0}
    base, other = (torch.tensor([row[key] for row in rows], dtype=torch.bool) for key in keys)
    return as_lists(compare_rates(base, other, groups=resampled_groups(rows))._asdict())


def _figures(rows: Sequence[dict[str, Any]], name: str, side: str) -> dict[str, Any]:
    keys = f"{BASE}/{name}", f"{side}/{name}"
    rows = [row for row in rows if all(row[key] is not None for key in keys)]
    if not rows:
        return {"pairs": 0}
    base, other = (torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in keys)
    groups = resampled_groups(rows)
    found: dict[str, Any] = {
        "pairs": len(rows),
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
