"""Summaries of an erasure, group by group, from one row per pair of clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from diffusers_ext.evaluation.noise_summary import resampled_groups
from diffusers_ext.evaluation.paired_comparison import as_lists, bootstrap_interval
from diffusers_ext.evaluation.rate_comparison import compare_rates


BASE, ALL = "base", "all"
BLANK = "blank"
DEGENERATE = (BLANK, "frozen", "noise")


def summarize_group(rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> dict[str, Any]:
    """Rates, figures, readings and degenerate clips of one group, from the rows of `ErasureReport`.

    Pairs whose base clip is blank are left out of all but the last: nothing can be erased from them; it
    is an error if all are.
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
    aspects, figures, readings = (
        [name for name in names if kinds[name] is kind] for kind in (bool, float, str)
    )
    return {
        "clips": len(used),
        "left_out": len(rows) - len(used),
        "prompts": len({row["prompt"] for row in used}),
        "rates": {side: {name: _rates(used, name, side) for name in aspects} for side in sides},
        "figures": {
            side: {
                **{name: _figures(used, name, side) for name in figures},
                "drift": _drift(used, side),
            }
            for side in sides
        },
        "readings": {
            name: {side: _shares(used, f"{side}/{name}") for side in (BASE, *sides)}
            for name in readings
        },
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
