"""Rates of the same prompts and seeds on two sides: how often something is seen, and by how much it changed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from diffusers_ext.evaluation.paired_comparison import Interval, effective_count, wilson_interval


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
    base: torch.Tensor,
    other: torch.Tensor,
    *,
    groups: torch.Tensor | None = None,
    confidence: float = 0.95,
) -> RateComparison:
    """Compare the rates of paired verdicts, `(pairs,)` bool.

    The intervals are Wilson's for the rates and Newcombe's for their difference, which stay open where
    all verdicts agree; a bootstrap would call such a difference certain, however few the pairs. Pairs of
    one of the `groups` (integers) may be alike, and the intervals count as many pairs as the groups are
    worth (`effective_count`).
    """
    for name, values in (("base", base), ("other", other)):
        if values.dtype != torch.bool or values.ndim != 1 or not len(values):
            raise ValueError(
                f"`{name}` must be (pairs,) bool, got {tuple(values.shape)} {values.dtype}."
            )
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


def _newcombe_interval(
    base: torch.Tensor, other: torch.Tensor, count: float, confidence: float
) -> Interval:
    """Newcombe's interval of a difference of paired rates (Stat. Med. 17, 2635, 1998, method 10).

    With the Wilson intervals `(l, u)` of both rates `p` and the correlation `phi` of the verdicts, the
    lower limit is `d - sqrt(a^2 - 2 phi a b + b^2)` where `a = p2 - l2` and `b = u1 - p1`; the upper one
    mirrors it.
    """
    share = count / len(base)  # pairs of one prompt count for less
    both, neither = ((base & other).sum() * share, (~base & ~other).sum() * share)
    only_base, only_other = ((base & ~other).sum() * share, (~base & other).sum() * share)
    margins = (
        (both + only_base) * (only_other + neither) * (both + only_other) * (only_base + neither)
    )
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
