from __future__ import annotations

import pytest
import torch

from diffusers_ext.evaluation.features import PixelFeatures
from diffusers_ext.evaluation.noise_summary import (
    Measurement,
    NoiseFigures,
    RunCost,
    best_of_summary,
    cost_summary,
    diversity_summary,
    resampled_groups,
)


@pytest.fixture
def cost() -> RunCost:
    found = RunCost(torch.device("cpu"))
    for part, seconds, memory in (("draw", 1.0, 100), ("score", 0.25, 0), ("refine fast", 0.1, 3),
                                  ("refine slow", 2.0, 7)):  # fmt: skip
        found.measurements[part] = [Measurement(1, seconds, memory)]
    return found


def rows_of(**columns: list[float]) -> list[dict]:
    names = {name.replace("_", " "): values for name, values in columns.items()}
    return [{"prompt": "a", **{f"{side}/r": values[i] for side, values in names.items()}} for i in range(2)]


def test_best_of_n_against_golden_noise_at_its_time(cost):
    candidates = {"r": torch.tensor([[0.0, 2.0, 4.0], [1.0, 1.0, 1.0]])}
    rows = rows_of(best_of_3=[4.0, 1.0], fast=[3.0, 2.0], slow=[5.0, 2.0])
    found = best_of_summary(rows, candidates, ["fast", "slow"], cost)
    assert found["seconds"] == [1, 2.5, 3.75]
    assert found["expected"]["r"] == pytest.approx([1.5, (10 / 3 + 1) / 2, 2.5])
    fast, slow = found["against"]["fast"], found["against"]["slow"]
    assert fast["time_ratio"] == pytest.approx(1.1 / 3.75)
    assert (fast["equal_time_count"], slow["equal_time_count"]) == (1, 2)
    assert slow["equal_time_mean"] == pytest.approx((10 / 3 + 1) / 2)
    assert (fast["difference"], slow["difference"]) == (0, 1)
    assert (fast["win_rate"], slow["win_rate"]) == (0.5, 1)
    assert (fast["matching_count"], slow["matching_count"]) == (3, None)


def test_cost_of_every_side(cost):
    found = cost_summary(cost, ["standard", "fast"], {"fast": {"parameter_bytes": 12}})
    assert found["standard"] == {
        "seconds": 1, "extra_seconds": 0, "extra_share": 0, "parameter_bytes": 0,
        "peak_memory_bytes": 100,
    }  # fmt: skip
    assert found["fast"] == {
        "seconds": 1.1, "extra_seconds": 0.1, "extra_share": 0.1, "parameter_bytes": 12,
        "peak_memory_bytes": 3,
    }  # fmt: skip
    assert found["score"] == {"seconds": 0.25}


def test_diversity_is_relative_to_the_standard_side():
    figures = NoiseFigures(["standard", "golden"], PixelFeatures(), 2)
    figures.distances = {"standard": [1.0, 2.0, 3.0], "golden": [0.5, 1.0, 1.5]}
    found = diversity_summary(figures)
    assert found["golden"]["ratio"] == 0.5
    assert found["golden"]["ratio_interval"] == pytest.approx([0.5, 0.5])
    figures.distances = {"standard": [1.0], "golden": [0.5]}
    assert diversity_summary(figures)["golden"]["ratio_interval"] is None
    figures.distances = {"standard": [0.0], "golden": [0.5]}
    assert diversity_summary(figures)["golden"] == {
        "distance": 0.5, "ratio": None, "ratio_interval": None,
    }  # fmt: skip


def test_prompts_are_resampled_whole_where_there_are_ten():
    rows = [{"prompt": str(index // 2)} for index in range(20)]
    assert resampled_groups(rows).tolist() == [index // 2 for index in range(20)]
    assert resampled_groups(rows[:18]) is None
