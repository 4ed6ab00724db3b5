from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.plots import (
    AttentionMaps,
    attention_maps,
    mean_over_layers,
    plot_attention_maps,
    plot_null_dimensions,
    plot_spectrum,
)
from tests.tiny_digits import random_digits_pipeline


@pytest.fixture(scope="module")
def pipeline():
    return random_digits_pipeline()


@pytest.fixture(scope="module")
def statistics(pipeline):
    return collect_statistics(
        pipeline,
        ["a red seven", "a blue one"],
        features=("q", "k", "v", "out"),
        num_inference_steps=2,
        show_progress=False,
    )


@pytest.fixture(scope="module")
def maps(pipeline) -> AttentionMaps:
    return attention_maps(pipeline, "a red seven", num_inference_steps=3, guidance_scale=3.0)


def assert_picture(path, width: int, height: int) -> None:
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    assert pixels.shape[0] >= height
    assert pixels.shape[1] >= width
    assert pixels.std() > 10
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def assert_no_overlap(figure, texts) -> None:
    """No label covers another one, or leaves the figure."""
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) > 1
    for index, box in enumerate(boxes):
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_spectrum_shows_every_matrix_and_the_numerical_zero(tmp_path, statistics):
    figure = plot_spectrum(statistics, tmp_path / "new" / "spectrum.png")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert len(lines) == len(statistics.moments) + 2 == 17
    text = lines["text (14 Linears)"].get_ydata()
    values = statistics.spectrum("text").values.flip(0)
    np.testing.assert_allclose(text, (values / values[0]).clamp_min(1e-16))
    assert "down.0.0.0.attn2.q" in lines
    assert axes.get_yscale() == "log"
    assert set(lines["numerical zero (1e-06)"].get_ydata()) == {1e-6}
    assert set(lines["numerical zero (1e-12)"].get_ydata()) == {1e-12}
    assert_picture(tmp_path / "new" / "spectrum.png", 700, 400)
    assert_no_overlap(figure, [*figure.legends[0].get_texts(), axes.title])


def test_spectrum_shows_chosen_matrices(statistics):
    figure = plot_spectrum(statistics, keys=["text"])
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert labels == ["text (14 Linears)", "numerical zero (1e-12)"]


@pytest.mark.parametrize(("keys", "got"), [(["text", "nowhere"], r"\['nowhere'\]"), ([], "none")])
def test_unknown_matrices_are_refused(statistics, keys, got):
    with pytest.raises(ValueError, match=f"`keys` must be among .*, got {got}"):
        plot_spectrum(statistics, keys=keys)


def test_null_dimensions_show_dimensions_and_their_share(tmp_path, statistics):
    figure = plot_null_dimensions(statistics, tmp_path / "null.png", energy=(0.0, 1e-2))
    (axes,) = figure.axes
    assert len(axes.patches) == 2 * 15
    texts = [text.get_text() for text in axes.texts]
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    row = labels.index("text (14 Linears)")
    values = statistics.spectrum("text").values
    exact = int((values <= 1e-12 * values[-1]).sum())
    assert 0 < exact < 128
    assert texts[row] == f"{exact} of 128"
    assert axes.patches[row].get_width() == pytest.approx(100 * exact / 128)
    assert axes.patches[15 + row].get_width() > axes.patches[row].get_width()
    assert_picture(tmp_path / "null.png", 700, 400)
    assert_no_overlap(figure, [*axes.get_yticklabels(), *axes.texts])


def test_null_dimensions_take_one_energy(statistics):
    figure = plot_null_dimensions(statistics, energy=1e-3)
    assert len(figure.axes[0].patches) == 15
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0.001"]


@pytest.mark.parametrize(
    ("energy", "message"),
    [([], "`energy` must hold at least one share"), (1.0, r"`energy` must be in \[0, 1\), got 1.0")],
)
def test_unfit_energies_are_refused(statistics, energy, message):
    with pytest.raises(ValueError, match=message):
        plot_null_dimensions(statistics, energy=energy)


def test_attention_maps_are_drawn_with_their_words_and_timesteps(tmp_path, maps):
    figure = plot_attention_maps(maps, tmp_path / "attention.png")
    axes = figure.axes[1]
    words = [tick.get_text().split("\n")[0] for tick in axes.get_xticklabels()]
    assert words == ["[start]", "a", "red", "seven", "[end]"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["t = 667", "t = 334", "t = 1"]
    assert_picture(tmp_path / "attention.png", 600, 300)
    assert_no_overlap(figure, [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.title])


def test_long_words_and_wide_pictures_fit(maps):
    wide = {"mid": torch.rand(3, 3, 2, 4, generator=torch.manual_seed(0))}
    tokens = ["an", "electroencephalograph", "of"]
    figure = plot_attention_maps(maps._replace(tokens=tokens, maps=wide))
    axes = figure.axes[1]
    assert axes.images[0].get_array().shape == (3 * 68 - 4, 3 * 132 - 4)
    assert_no_overlap(figure, [axes.title, *axes.get_yticklabels()])
    assert {text.get_rotation() for text in axes.get_xticklabels()} == {30.0}


def test_attention_maps_show_where_a_token_is_looked_at(maps):
    focus = torch.full((1, 2, 4, 4), 0.1)
    focus[0, 1, 3, 0] = 0.4
    figure = plot_attention_maps(AttentionMaps(["$x", "y_{"], [500], {"mid": focus}, maps.image))
    shown = figure.axes[1].images[0].get_array()
    assert shown.shape == (64, 132)
    first, second = shown[:, :64], shown[:, 68:]
    assert np.allclose(first, 0, atol=1e-6)
    assert np.unravel_index(second.argmax(), second.shape) == (48, 0)
    assert second.max() == pytest.approx(np.log2(0.4 / (1.9 / 16)), rel=1e-4)
    labels = [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
    assert labels == ["$x\n10.0 %", "y_{\n11.9 %"]
    figure.canvas.draw()


def test_layers_are_averaged_at_the_finest_size(maps):
    coarse = torch.arange(4.0).reshape(1, 1, 2, 2)
    mean = mean_over_layers(maps._replace(maps={"a": coarse, "b": torch.zeros(1, 1, 4, 4)}))
    assert mean.shape == (1, 1, 4, 4)
    assert mean[0, 0, 0, 0] == 0
    assert mean[0, 0, 3, 3] == 1.5
    assert mean.mean() == pytest.approx(0.75)


@pytest.mark.parametrize("draw", [plot_spectrum, plot_null_dimensions])
def test_without_matplotlib_the_error_says_what_to_install(statistics, monkeypatch, draw):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install diffusers_ext\[plots\]"):
        draw(statistics)


def test_pyplot_is_not_loaded_or_asked(statistics, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert plot_spectrum(statistics).axes
