from __future__ import annotations

import json

import pytest

from diffusers_ext.evaluation.erasure_report import ErasureReport
from diffusers_ext.evaluation.forgetting import ForgettingReport
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.evaluation.measured_results import measured_results


def test_figures_of_a_forgetting_report(tmp_path):
    figures = {"prompts": 3, "images": 12, "pixel_drift": 0.25, "clip_score_tuned": 0.5}
    report = ForgettingReport({}, 0.0, [], {"held_out": figures})
    report.to_json(tmp_path / "report.json")
    found = measured_results(tmp_path)
    assert [(r.dataset, r.metric, r.value) for r in found] == [
        ("held out prompts", "pixel drift", 0.25), ("held out prompts", "clip score tuned", 0.5),
    ]  # fmt: skip
    assert found[0].notes == "3 prompts, 12 pictures"


def test_figures_of_a_golden_noise_report(tmp_path):
    compared = {
        "pairs": 8, "difference": 0.125, "difference_interval": [0.0, 0.25], "win_rate": 0.75,
        "win_rate_interval": [0.5, 1.0],
    }  # fmt: skip
    report = GoldenNoiseReport({}, {"golden": {"hps": compared}}, {}, {}, {}, {}, [])
    report.to_json(tmp_path / "golden.json")
    difference, wins = measured_results(tmp_path / "golden.json")
    assert (difference.metric, difference.value) == (
        "hps, difference of golden to standard noise", 0.125,
    )  # fmt: skip
    assert (wins.value, wins.notes) == (0.75, "95 % interval 0.5 to 1")


def test_figures_of_an_erasure_report(tmp_path):
    seen = {"pairs": 8, "base": 0.875, "other": 0.125, "other_interval": [0.0, 0.5]}
    rates = {"erased": {"seven": seen, "never judged": {"pairs": 0}}}
    ErasureReport({}, {"target": {"rates": rates}}, []).to_json(tmp_path / "report.json")
    (found,) = measured_results(tmp_path)
    assert (found.dataset, found.value) == ("target prompts", 0.125)
    assert found.metric == "share of clips that show seven, erased"
    assert found.notes == "0.875 without the eraser; 8 clips; 95 % interval 0 to 0.5"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "`results` must be the report of an evaluation, got .*report.json: no such file"),
        ("{", "report.json must hold JSON"),
        (json.dumps({"loss": 1}), "must be the report of an evaluation, got ..loss"),
        ("[]", "report.json must hold a JSON object, got a list"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        measured_results(tmp_path)
