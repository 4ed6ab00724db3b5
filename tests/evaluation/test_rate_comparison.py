from __future__ import annotations

import pytest
import torch

from diffusers_ext.evaluation.erasure_summary import compare_rates
from diffusers_ext.evaluation.paired_comparison import wilson_interval


def verdicts(*counts: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of (base, other, how many)."""
    pairs = torch.tensor([[base, other] for base, other, count in counts for _ in range(count)])
    return pairs[:, 0].bool(), pairs[:, 1].bool()


def test_the_interval_of_a_difference_is_newcombes():
    # Newcombe, Stat. Med. 17, 2635 (1998), table II: 36, 12, 2, 0 of 50 pairs.
    base, other = verdicts((1, 1, 36), (0, 1, 12), (1, 0, 2))
    found = compare_rates(base, other)
    assert found.pairs == 50
    assert found.difference == pytest.approx(0.2)
    assert found.difference_interval == pytest.approx((0.0569, 0.3404), abs=5e-5)
    back = compare_rates(other, base).difference_interval
    assert back == pytest.approx((-0.3404, -0.0569), abs=5e-5)


def test_rates_have_wilson_intervals():
    base, other = verdicts((1, 1, 2), (1, 0, 6), (0, 0, 2))
    found = compare_rates(base, other, confidence=0.9)
    assert (found.base, found.other) == (0.8, 0.2)
    assert found.base_interval == wilson_interval(0.8, 10, 0.9)
    assert found.other_interval == wilson_interval(0.2, 10, 0.9)
    assert found.difference == pytest.approx(-0.6)


@pytest.mark.parametrize("count", [20, 200])
def test_agreement_is_not_certainty(count):
    same = torch.ones(count, dtype=torch.bool)
    low, high = compare_rates(same, same).difference_interval
    assert -low == pytest.approx(high)
    assert 0.5 / count < high < 4 / count  # about the rule of three


def test_pairing_narrows_the_interval():
    paired = compare_rates(*verdicts((1, 1, 50), (0, 0, 50))).difference_interval
    crossed = compare_rates(*verdicts((1, 1, 25), (0, 0, 25), (1, 0, 25), (0, 1, 25)))
    assert paired.high - paired.low < 0.3 * (
        crossed.difference_interval.high - crossed.difference_interval.low
    )


def test_pairs_of_one_prompt_count_for_less():
    base, other = verdicts((1, 1, 30), (1, 0, 30))
    groups = torch.arange(60) // 10  # six prompts, all of whose clips agree
    grouped, single = compare_rates(base, other, groups=groups), compare_rates(base, other)
    assert grouped.other == single.other
    assert grouped.other_interval == wilson_interval(0.5, 6)
    assert grouped.difference_interval.low < single.difference_interval.low
    assert grouped.difference_interval.high > single.difference_interval.high


@pytest.mark.parametrize(
    ("base", "other", "message"),
    [
        (torch.ones(2), torch.ones(2), r"`base` must be \(pairs,\) bool, got \(2,\) torch.float32"),
        (
            torch.ones(2).bool(),
            torch.ones(0).bool(),
            r"`other` must be \(pairs,\) bool, got \(0,\)",
        ),
        (torch.ones(2).bool(), torch.ones(3).bool(), r"one verdict per pair \(2\), got 3"),
    ],
)
def test_other_tensors_are_refused(base, other, message):
    with pytest.raises(ValueError, match=message):
        compare_rates(base, other)
