from __future__ import annotations

import itertools

import pytest
import torch

from diffusers_ext.evaluation.paired_comparison import (
    bootstrap_interval,
    compare_pairs,
    compare_rates,
    effective_count,
    expected_best,
    mean_pairwise_distance,
    resampled_groups,
    wilson_interval,
    win_rate,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_win_is_strict_and_a_tie_counts_half():
    standard, other = torch.tensor([1.0, 1, 1, 1]), torch.tensor([2.0, 1, 1, 0.5])
    assert win_rate(standard, other) == 0.5
    assert win_rate(standard, standard) == 0.5
    assert win_rate(standard, standard + 1) == 1


def test_wilson_interval_is_the_published_one():
    # 10 of 20: Newcombe, Statistics in Medicine 17 (1998), gives 0.2993 to 0.7007.
    assert wilson_interval(0.5, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    low, high = wilson_interval(1.0, 10)
    assert low == pytest.approx(0.7225, abs=1e-4)
    assert high == 1
    assert wilson_interval(0.0, 10) == pytest.approx((0, 1 - low))


def test_the_bootstrap_covers_the_mean_as_a_normal_interval_does():
    values = normal(400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std().item() / 20
    assert (low, high) == pytest.approx((values.mean().item() - half, values.mean().item() + half), abs=0.01)
    assert bootstrap_interval(values) == (low, high)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow.low < narrow.high < high


def test_the_bootstrap_of_a_ratio_of_means():
    weights = normal(50).abs() + 1
    assert bootstrap_interval(0.8 * weights, weights) == pytest.approx((0.8, 0.8))


def test_alike_values_of_a_group_count_once():
    groups = torch.arange(30).repeat_interleave(20)
    values = normal(30).repeat_interleave(20)
    low, high = bootstrap_interval(values)
    grouped = bootstrap_interval(values, groups=groups)
    expected = bootstrap_interval(normal(30))
    assert grouped == pytest.approx(expected, abs=1e-6)
    assert grouped.high - grouped.low > 3 * (high - low)


def test_few_draws_at_once_change_nothing(monkeypatch):
    values = normal(40)
    expected = bootstrap_interval(values, resamples=999)
    monkeypatch.setattr("diffusers_ext.evaluation.paired_comparison._CHUNK", 100)
    assert bootstrap_interval(values, resamples=999) == pytest.approx(expected, abs=1e-12)


def test_best_of_n_is_the_mean_over_all_choices():
    scores, other = normal(5, 4), normal(5, 4, seed=1)
    for n, mean, worth in zip(range(1, 5), expected_best(scores), expected_best(scores, other), strict=True):
        chosen = [list(c) for c in itertools.combinations(range(4), n)]
        best = torch.stack([scores[:, c].amax(1) for c in chosen]).double()
        picks = [torch.tensor(c)[scores[:, c].argmax(1)] for c in chosen]
        values = torch.stack([other[torch.arange(5), pick] for pick in picks]).double()
        assert mean.item() == pytest.approx(best.mean().item(), rel=1e-6)
        assert worth.item() == pytest.approx(values.mean().item(), rel=1e-5)


def test_mean_pairwise_distance():
    features = torch.tensor([[0.0, 0], [3.0, 3], [0.0, 6]])
    rms = [3, (36 / 2) ** 0.5, 3]
    assert mean_pairwise_distance(features) == pytest.approx(sum(rms) / 3)
    assert mean_pairwise_distance(torch.ones(4, 7)) == 0


def test_a_comparison_holds_all_of_it():
    standard = normal(200)
    other = standard + 0.5 + 0.1 * normal(200, seed=1)
    other[0] = standard[0]
    found = compare_pairs(standard, other)
    assert (found.pairs, found.ties) == (200, 1)
    assert found.mean_other - found.mean_standard == pytest.approx(found.difference)
    assert found.difference_interval.low < found.difference < found.difference_interval.high
    assert found.difference_interval == bootstrap_interval(other.double() - standard.double())
    assert found.win_rate == win_rate(standard, other) > 0.95
    assert found.win_rate_interval == wilson_interval(found.win_rate, 200)


def test_grouped_values_are_worth_fewer():
    groups = torch.arange(50).repeat_interleave(4)
    alike = normal(50).repeat_interleave(4)
    assert effective_count(alike, groups) == pytest.approx(50)
    assert effective_count(normal(200), groups) > 120
    assert effective_count(torch.ones(200), groups) == 50
    together = compare_pairs(torch.zeros(200), alike + 0.5, groups=groups)
    single = compare_pairs(torch.zeros(200), alike + 0.5)
    assert together.win_rate == single.win_rate
    assert together.win_rate_interval.low < single.win_rate_interval.low
    assert together.win_rate_interval == wilson_interval(together.win_rate, 50)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare_pairs(normal(3), normal(4)), r"one score per pair \(3\), got 4"),
        (lambda: compare_pairs(normal(0), normal(0)), r"`standard` must be finite \(n,\), got"),
        (
            lambda: compare_pairs(normal(2), torch.tensor([0.0, torch.nan])),
            r"`other` must be finite \(n,\), got \(2,\) with NaN",
        ),
        (lambda: wilson_interval(1.1, 3), r"`rate` must be in \[0, 1\]"),
        (lambda: wilson_interval(0.5, 0), "`count` at least 1, got 0.5 and 0"),
        (lambda: wilson_interval(0.5, 3, 1.0), r"`confidence` must be in \(0, 1\), got 1.0"),
        (lambda: bootstrap_interval(normal(3), normal(2)), r"`weights` must be \(3,\)"),
        (lambda: bootstrap_interval(normal(3), groups=torch.zeros(2)), r"`groups` must be \(3,\)"),
        (lambda: bootstrap_interval(normal(3), resamples=0), "`resamples` at least 1, got"),
        (lambda: expected_best(torch.full((2, 2), torch.nan)), "`selection` must be finite"),
        (lambda: expected_best(normal(0, 2)), r"must be finite \(pictures, candidates\)"),
        (lambda: expected_best(normal(2, 2), normal(2, 3)), r"`scores` must be \(2, 2\)"),
        (lambda: mean_pairwise_distance(normal(1, 3)), "with two rows at least"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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
    assert paired.high - paired.low < 0.3 * (crossed.difference_interval.high - crossed.difference_interval.low)


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
        (torch.ones(2).bool(), torch.ones(0).bool(), r"`other` must be \(pairs,\) bool, got \(0,\)"),
        (torch.ones(2).bool(), torch.ones(3).bool(), r"one verdict per pair \(2\), got 3"),
    ],
)
def test_other_tensors_are_refused(base, other, message):
    with pytest.raises(ValueError, match=message):
        compare_rates(base, other)


def test_prompts_are_resampled_whole_where_there_are_ten():
    rows = [{"prompt": str(index // 2)} for index in range(20)]
    assert resampled_groups(rows).tolist() == [index // 2 for index in range(20)]
    assert resampled_groups(rows[:18]) is None
