from __future__ import annotations

import pytest
import torch

from diffusers_ext.evaluation.erasure_report import compare_rates, summarize_group
from diffusers_ext.evaluation.paired_comparison import wilson_interval
from tests.evaluation.drawn_erasure import rows_of


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


def test_rates_figures_and_readings():
    rows = rows_of("target", 40, lambda i: {"digit": i < 4, "motion": 0.4, "drift": i / 40,
                                             "reads_as": "seven" if i < 4 else "one"})  # fmt: skip
    found = summarize_group(rows, ["erased"])
    rate = found["rates"]["erased"]["digit"]
    assert (rate["base"], rate["other"]) == (1.0, 0.1)
    assert rate["difference"] == pytest.approx(-0.9)
    assert rate["other_interval"] == list(wilson_interval(0.1, 40))
    assert found["rates"]["erased"]["color"]["difference"] == 0
    motion = found["figures"]["erased"]["motion"]
    assert motion["ratio"] == pytest.approx(0.8)
    assert motion["ratio_interval"] == pytest.approx([0.8, 0.8])
    assert motion["difference"] == pytest.approx(-0.1)
    drift = found["figures"]["erased"]["drift"]
    assert drift["other"] == pytest.approx(19.5 / 40)
    assert drift["other_interval"][0] < drift["other"] < drift["other_interval"][1]
    assert found["readings"]["reads_as"] == {"base": {"seven": 1.0}, "erased": {"one": 0.9, "seven": 0.1}}
    assert (found["clips"], found["prompts"], found["left_out"]) == (40, 40, 0)


def test_clips_of_few_prompts_are_resampled_one_by_one():
    rows = rows_of("target", 40, lambda i: {"digit": i < 4}, prompts=2)
    rate = summarize_group(rows, ["erased"])["rates"]["erased"]["digit"]
    assert rate["other_interval"] == list(wilson_interval(0.1, 40))
    alike = rows_of("target", 40, lambda i: {"digit": i % 20 < 2}, prompts=20)
    rate = summarize_group(alike, ["erased"])["rates"]["erased"]["digit"]
    assert rate["other_interval"] == list(wilson_interval(0.1, 20))


def test_masked_verdicts_are_left_out():
    def half(index: int) -> dict[str, bool | None]:
        return {"digit": True if index % 2 else None, "color": None}

    found = summarize_group(rows_of("anchor", 10, half, half), ["erased"])
    assert found["rates"]["erased"]["digit"]["pairs"] == 5
    assert "color" not in found["rates"]["erased"]


def test_blank_clips_of_the_base_say_nothing():
    def base(index: int) -> dict[str, str | bool]:
        return {"degenerate": "blank", "digit": False} if index < 3 else {"degenerate": "frozen"}

    rows = rows_of("target", 10, lambda i: {"degenerate": "blank"} if i > 7 else {}, base)
    found = summarize_group(rows, ["erased"])
    assert (found["clips"], found["left_out"]) == (7, 3)
    assert found["rates"]["erased"]["digit"]["base"] == 1.0
    assert found["degenerate"] == {
        "base": {"blank": 3, "frozen": 7, "noise": 0},
        "erased": {"blank": 2, "frozen": 0, "noise": 0},
    }
    with pytest.raises(ValueError, match="got blank ones only for the 3 of group 'target'"):
        summarize_group(rows[:3], ["erased"])


def test_no_ratio_to_nothing():
    rows = rows_of("target", 3, base=lambda i: {"motion": float(i)})
    motion = summarize_group(rows, ["erased"])["figures"]["erased"]["motion"]
    assert "ratio" not in motion
    assert motion["difference"] == pytest.approx(-0.5)
