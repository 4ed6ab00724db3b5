from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.evaluation.features import PixelFeatures
from diffusers_ext.evaluation.noise_summary import (
    Measurement,
    NoiseFigures,
    RunCost,
    best_of_summary,
    cost_summary,
    diversity_summary,
)
from diffusers_ext.evaluation.rendering import shots_of
from diffusers_ext.golden_noise.noise_statistics import radial_spectrum

SIDES = ["standard", "golden"]


def add(figures: NoiseFigures, count: int, prompts: tuple[str, ...] = ("a", "b"), batch: int = 3):
    shots = shots_of(prompts, count, 0)
    noise = torch.randn(len(shots), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for start in range(0, len(shots), batch):
        part = slice(start, start + batch)
        size = len(shots[part])
        shades = [(start + i) * 20 for i in range(size)]
        images = {side: [Image.new("RGB", (300, 30), (s, 0, 0)) for s in shades] for side in SIDES}
        noises = {"standard": noise[part], "golden": 2 * noise[part]}
        scores = {side: {"r": torch.arange(size).double()} for side in (*SIDES, "best of 2")}
        figures.add(shots[part], images, noises, scores)
    return noise


def test_rows_noise_and_spectrum_over_batches():
    figures = NoiseFigures(SIDES, PixelFeatures(8), 4)
    noise = add(figures, 4)
    assert len(figures.rows) == 8
    assert [row["golden/noise_std"] for row in figures.rows] == pytest.approx(
        (2 * noise).std((1, 2, 3), correction=0).tolist(), rel=1e-5
    )
    assert [row["golden/noise_change"] for row in figures.rows] == pytest.approx([1] * 8)
    assert "standard/noise_change" not in figures.rows[0]
    assert [row["best of 2/r"] for row in figures.rows] == [0, 1, 2, 0, 1, 2, 0, 1]
    expected = radial_spectrum(noise)
    for found, value in zip(figures.spectrum("golden"), expected, strict=True):
        if value.isnan():
            assert found is None
        else:
            assert found == pytest.approx(4 * value.item())


def test_distances_are_of_whole_prompts_and_their_features_are_dropped():
    figures = NoiseFigures(SIDES, PixelFeatures(8), 4)
    add(figures, 4)
    # Reds 0, 20, 40, 60: distances of 1, 2 and 3 steps, of one of three channels.
    steps = (3 * 1 + 2 * 2 + 1 * 3) / 6 * 20 / 255 / 3**0.5
    assert figures.distances["golden"] == pytest.approx([steps, steps], rel=1e-5)
    assert figures._features == {}
    single = NoiseFigures(SIDES, PixelFeatures(8), 1)
    add(single, 1)
    assert single.distances == {"standard": [], "golden": []}


def test_two_small_pictures_of_the_first_prompts_are_kept():
    figures = NoiseFigures(SIDES, PixelFeatures(8), 3, sheet_prompts=1)
    add(figures, 3, batch=2)
    assert [kept.prompt for kept in figures.kept] == ["a", "a"]
    assert figures.kept[0].pictures["golden"].size == (256, 26)
    assert figures.kept[1].scores == {"standard": 1, "golden": 1}
    none = NoiseFigures(SIDES, PixelFeatures(8), 3, sheet_prompts=0)
    add(none, 3)
    assert none.kept == []


@pytest.fixture
def costs() -> RunCost:
    found = RunCost(torch.device("cpu"))
    for part, seconds, memory in (("draw", 1.0, 100), ("score", 0.25, 0), ("refine fast", 0.1, 3),
                                  ("refine slow", 2.0, 7)):  # fmt: skip
        found.measurements[part] = [Measurement(1, seconds, memory)]
    return found


def rows_of(**columns: list[float]) -> list[dict]:
    names = {name.replace("_", " "): values for name, values in columns.items()}
    return [{"prompt": "a", **{f"{side}/r": values[i] for side, values in names.items()}} for i in range(2)]


def test_best_of_n_against_golden_noise_at_its_time(costs):
    candidates = {"r": torch.tensor([[0.0, 2.0, 4.0], [1.0, 1.0, 1.0]])}
    rows = rows_of(best_of_3=[4.0, 1.0], fast=[3.0, 2.0], slow=[5.0, 2.0])
    found = best_of_summary(rows, candidates, ["fast", "slow"], costs)
    assert found["seconds"] == [1, 2.5, 3.75]
    assert found["expected"]["r"] == pytest.approx([1.5, (10 / 3 + 1) / 2, 2.5])
    fast, slow = found["against"]["fast"], found["against"]["slow"]
    assert fast["time_ratio"] == pytest.approx(1.1 / 3.75)
    assert (fast["equal_time_count"], slow["equal_time_count"]) == (1, 2)
    assert slow["equal_time_mean"] == pytest.approx((10 / 3 + 1) / 2)
    assert (fast["difference"], slow["difference"]) == (0, 1)
    assert (fast["win_rate"], slow["win_rate"]) == (0.5, 1)
    assert (fast["matching_count"], slow["matching_count"]) == (3, None)


def test_cost_of_every_side(costs):
    found = cost_summary(costs, ["standard", "fast"], {"fast": {"parameter_bytes": 12}})
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


@pytest.fixture
def cost() -> RunCost:
    return RunCost(torch.device("cpu"))


def test_the_first_and_smaller_batches_do_not_count(cost):
    times = [(4, 40.0), (4, 4.0), (4, 8.0), (4, 400.0), (1, 90.0)]
    cost.measurements["draw"] = [Measurement(*found, None) for found in times]
    assert cost.seconds("draw") == 2
    cost.measurements["draw"] = [Measurement(4, 8.0, None), Measurement(1, 1.0, None)]
    assert cost.seconds("draw") == 1.5


def test_a_block_is_timed(cost):
    for _ in range(2):
        with cost.measure("sleep", 2):
            time.sleep(0.02)
    assert 0.01 <= cost.seconds("sleep") < 60


def test_memory_is_what_the_largest_resident_set_grew_by(cost):
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # More than what other tests have used and given back.
    size = 2**28 + max(0, largest - pages * resource.getpagesize())
    with cost.measure("nothing", 1):
        pass
    with cost.measure("much", 1):
        np.ones(size, dtype=np.uint8)
    with cost.measure("again", 1):
        np.ones(size // 2, dtype=np.uint8)
    assert cost.peak_memory("nothing") < size // 8
    assert cost.peak_memory("much") > 0
    assert cost.peak_memory("again") < size // 8


def test_an_exception_is_no_measurement(cost):
    with pytest.raises(RuntimeError, match="stop"), cost.measure("draw", 1):
        raise RuntimeError("stop")
    assert not cost.measurements


def test_unknown_memory_is_none(cost):
    cost.measurements["draw"] = [Measurement(1, 1.0, None)]
    assert cost.peak_memory("draw") is None
