from __future__ import annotations

import pytest

from diffusers_ext.evaluation.erasure_summary import summarize_group
from diffusers_ext.evaluation.paired_comparison import wilson_interval
from tests.evaluation.drawn_erasure import rows_of


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
    assert found["readings"]["reads_as"] == {
        "base": {"seven": 1.0},
        "erased": {"one": 0.9, "seven": 0.1},
    }
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
