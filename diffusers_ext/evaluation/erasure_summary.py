"""Summaries of an erasure, group by group, from one row per pair of clips."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from diffusers_ext.evaluation.noise_summary import resampled_groups
from diffusers_ext.evaluation.paired_comparison import (
    Interval,
    as_lists,
    bootstrap_interval,
    effective_count,
    wilson_interval,
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
