"""Statistics of pairs that two models drew of the same prompts and seeds: means, rates, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import torch

_CHUNK = 2_000_000  # draws at once, so that a bootstrap needs little memory
_FEWEST_GROUPS = 10  # a bootstrap over fewer prompts than that says nothing


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class PairedComparison(NamedTuple):
    """How `other` does against `standard` on the same pairs; higher scores are better."""

    pairs: int
    mean_standard: float
    mean_other: float
    difference: float  # mean of other - standard
    difference_interval: Interval
    win_rate: float  # share strictly better, ties counted half
    win_rate_interval: Interval
    ties: int


def compare_pairs(
    standard: torch.Tensor,
    other: torch.Tensor,
    *,
    groups: torch.Tensor | None = None,
    confidence: float = 0.95,
    resamples: int = 4000,
) -> PairedComparison:
    """Compare scores `(pairs,)` of the same prompts and seeds.

    The interval of the difference is `bootstrap_interval`'s. Pairs of one of the `groups` (integers) are resampled
    together, and count as many as they are worth (`effective_count`) in Wilson's interval of the win rate.
    """
    standard, other = _check_scores("standard", standard), _check_scores("other", other)
    if standard.shape != other.shape:
        raise ValueError(f"`other` must hold one score per pair ({len(standard)}), got {len(other)}.")
    rate, count = win_rate(standard, other), float(len(standard))
    difference = other - standard
    if groups is not None:
        count = effective_count((difference.sign() + 1) / 2, groups)
    return PairedComparison(
        len(standard),
        standard.mean().item(),
        other.mean().item(),
        difference.mean().item(),
        bootstrap_interval(difference, groups=groups, confidence=confidence, resamples=resamples),
        rate,
        wilson_interval(rate, count, confidence),
        int((difference == 0).sum()),
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
    rate, other_rate = first.mean().item(), second.mean().item()
    return RateComparison(
        len(base),
        rate,
        wilson_interval(rate, counts[0], confidence),
        other_rate,
        wilson_interval(other_rate, counts[1], confidence),
        (second - first).mean().item(),
        _newcombe_interval(base, other, counts[2], confidence),
    )


def _newcombe_interval(base: torch.Tensor, other: torch.Tensor, count: float, confidence: float) -> Interval:
    """Newcombe's interval of a difference of paired rates (Stat. Med. 17, 2635, 1998, method 10).

    With the Wilson intervals `(l, u)` of both rates `p` and the correlation `phi` of the verdicts, the lower limit is
    `d - sqrt(a^2 - 2 phi a b + b^2)` where `a = p2 - l2` and `b = u1 - p1`; the upper one mirrors it.
    """
    share = count / len(base)  # pairs of one prompt count for less
    both, neither = (base & other).sum() * share, (~base & ~other).sum() * share
    only_base, only_other = (base & ~other).sum() * share, (~base & other).sum() * share
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


def win_rate(standard: torch.Tensor, other: torch.Tensor) -> float:
    """Share of pairs `(pairs,)` in which `other` is strictly better; ties count half."""
    return ((other > standard).double() + 0.5 * (other == standard).double()).mean().item()


def effective_count(values: torch.Tensor, groups: torch.Tensor) -> float:
    """How many independent values grouped ones are worth: `n` over the design effect (Kish, 1965).

    Between the number of groups and `n`: variance of the mean if all were independent over that of whole groups, times
    `n`.
    """
    residuals = values.double() - values.double().mean()
    _, row = torch.unique(groups, return_inverse=True)
    number = int(row.max()) + 1
    sums = residuals.new_zeros(number).index_add_(0, row, residuals)
    grouped = sums.square().sum().item()
    if grouped == 0:
        return float(number)
    worth = len(values) * residuals.square().sum().item() / grouped
    return min(max(worth, float(number)), float(len(values)))


def wilson_interval(rate: float, count: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share of `count` (J. Am. Stat. Assoc. 22, 1927); it stays within [0, 1]."""
    if count < 1 or not 0 <= rate <= 1:
        raise ValueError(f"`rate` must be in [0, 1] and `count` at least 1, got {rate} and {count}.")
    z = NormalDist().inv_cdf(0.5 + _check_confidence(confidence) / 2)
    scale = 1 + z * z / count
    centre = (rate + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_interval(
    values: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    groups: torch.Tensor | None = None,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a mean of `(n,)` values (Efron, Ann. Statist. 7, 1979), deterministic.

    With `weights` it is of `sum(values) / sum(weights)`, a ratio of means. Of `groups` (integers) whole ones are
    resampled, as pictures of one prompt are alike and count for less than as many prompts.
    """
    values = _check_scores("values", values)
    weights = torch.ones_like(values) if weights is None else _check_scores("weights", weights)
    if weights.shape != values.shape or resamples < 1:
        raise ValueError(
            f"`weights` must be {tuple(values.shape)} and `resamples` at least 1, got "
            f"{tuple(weights.shape)} and {resamples}."
        )
    sums = torch.stack([values, weights], dim=1)
    if groups is not None:
        if groups.shape != values.shape:
            raise ValueError(f"`groups` must be {tuple(values.shape)}, got {tuple(groups.shape)}.")
        _, row = torch.unique(groups, return_inverse=True)
        sums = sums.new_zeros(int(row.max()) + 1, 2).index_add_(0, row, sums)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for start in range(0, resamples, max(1, _CHUNK // len(sums))):
        count = min(max(1, _CHUNK // len(sums)), resamples - start)
        drawn = torch.randint(len(sums), (count, len(sums)), generator=generator)
        total = sums[drawn].sum(1)
        means.append(total[:, 0] / total[:, 1])
    tail = (1 - _check_confidence(confidence)) / 2
    ends = torch.quantile(torch.cat(means), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Interval(*ends.tolist())


def expected_best(selection: torch.Tensor, scores: torch.Tensor | None = None) -> torch.Tensor:
    """Mean score of the best of n candidates, for every n up to all of them: `(candidates,)` float64.

    Of N candidates in ascending order, the i-th is the best of n drawn without replacement with probability C(i - 1, n
    - 1) / C(N, n); so all N serve every n. The best has the highest `selection` `(pictures, candidates)`; `scores`,
    `selection` when `None`, say what it is worth.
    """
    if selection.ndim != 2 or not selection.numel() or not torch.isfinite(selection).all():
        raise ValueError(
            "`selection` must be finite (pictures, candidates), got "
            f"{tuple(selection.shape)}{' with NaN' if selection.numel() else ''}."
        )
    scores = selection if scores is None else scores
    if scores.shape != selection.shape:
        raise ValueError(f"`scores` must be {tuple(selection.shape)} like `selection`, got {tuple(scores.shape)}.")
    count = selection.shape[1]
    order = selection.argsort(dim=1, stable=True)
    means = scores.double().gather(1, order).mean(0)
    chances = [[math.comb(i, n - 1) / math.comb(count, n) for i in range(count)] for n in range(1, count + 1)]
    return torch.tensor(chances, dtype=torch.float64) @ means


def mean_pairwise_distance(features: torch.Tensor) -> float:
    """Root mean square difference of two rows of `(n, dim)`, averaged over all pairs of rows."""
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"`features` must be (n, dim) with two rows at least, got {tuple(features.shape)}.")
    distances = torch.pdist(features.double()) / math.sqrt(features.shape[1])
    return distances.mean().item()


def as_lists(found: Mapping[str, Any]) -> dict[str, Any]:
    """Intervals as lists, as JSON gives them back."""
    return {name: list(x) if isinstance(x, tuple) else x for name, x in found.items()}


def resampled_groups(rows: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
    """The prompts as groups of the bootstrap, `(n,)` integers; `None`, for single pairs, where they are too few."""
    names = [row["prompt"] for row in rows]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names]) if len(numbers) >= _FEWEST_GROUPS else None


def _check_scores(name: str, scores: torch.Tensor) -> torch.Tensor:
    if scores.ndim != 1 or not len(scores) or not torch.isfinite(scores).all():
        problem = " with NaN or infinite values" if scores.ndim == 1 and len(scores) else ""
        raise ValueError(f"`{name}` must be finite (n,), got {tuple(scores.shape)}{problem}.")
    return scores.double()


def _check_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence}.")
    return confidence
