from __future__ import annotations

import pytest
import torch
from PIL import Image

from diffusers_ext.evaluation.features import PixelFeatures
from diffusers_ext.evaluation.noise_summary import NoiseFigures
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
