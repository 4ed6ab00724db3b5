from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.plots import plot_covariance_statistics, plot_null_dimensions, plot_spectrum
from tests.nullspace.pictures import assert_no_overlap, assert_picture
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
    assert all(patch.get_height() == pytest.approx(0.4) for patch in axes.patches)  # two bars and a gap a row
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


def test_statistics_tell_rank_null_dimensions_and_condition(tmp_path, pipeline):
    statistics = collect_statistics(
        pipeline, ["a red seven"], features=("q", "k", "v"), num_inference_steps=2, show_progress=False
    )
    figure = plot_covariance_statistics(statistics, tmp_path / "a" / "b.png", threshold=1e-2)
    rank, null, ranges, condition = figure.axes
    row = [text.get_text() for text in rank.get_yticklabels()].index("text (14 Linears)")
    found = statistics.validate()["text"]
    assert rank.texts[row].get_text() == f"{found['rank']} of 128"
    below = int((statistics.spectrum("text").values < 1e-2).sum())
    assert null.texts[row].get_text() == f"{below} of 128"
    assert condition.texts[row].get_text() == "singular"
    assert "threshold 0.01" in ranges.get_legend().get_texts()[0].get_text()
    assert np.asarray(Image.open(tmp_path / "a" / "b.png").convert("L")).std() > 10


@pytest.mark.parametrize("draw", [plot_spectrum, plot_null_dimensions])
def test_without_matplotlib_the_error_says_what_to_install(statistics, monkeypatch, draw):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install diffusers_ext\[plots\]"):
        draw(statistics)


def test_pyplot_is_not_loaded_or_asked(statistics, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert plot_spectrum(statistics).axes
