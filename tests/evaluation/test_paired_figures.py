from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusers_ext.evaluation.features import PixelFeatures
from diffusers_ext.evaluation.paired_comparison import (
    Instruments,
    PairedFigures,
    diversity,
    feature_drift,
    pixel_drift,
)
from diffusers_ext.evaluation.rendering import Shot, shots_of


def pixels(count: int, seed: int, size: int = 4) -> torch.Tensor:
    levels = torch.randint(0, 256, (count, 3, size, size), generator=torch.manual_seed(seed))
    return levels / 255


def test_pixel_drift_is_the_mean_absolute_difference():
    base, tuned = pixels(3, 0), pixels(3, 1)
    expected = [np.abs(b - t).mean() for b, t in zip(base.numpy(), tuned.numpy(), strict=True)]
    assert pixel_drift(base, tuned).tolist() == pytest.approx(expected, rel=1e-5)
    assert pixel_drift(base, base).tolist() == [0, 0, 0]
    assert pixel_drift(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)).item() == 1


def test_feature_drift_is_half_of_one_minus_the_cosine():
    a, b = torch.randn(5, 7, generator=torch.manual_seed(0)), torch.randn(5, 7)
    expected = (1 - F.cosine_similarity(a.double(), b.double())) / 2
    assert torch.allclose(feature_drift(a, b), expected)
    assert feature_drift(a, a).tolist() == [0] * 5
    assert feature_drift(a, -3 * a).tolist() == pytest.approx([1] * 5)
    # Black pictures have no direction; two of them still are the same.
    assert feature_drift(torch.zeros(1, 3), torch.zeros(1, 3)).item() == 0


def test_diversity_is_the_mean_drift_over_pairs():
    features = torch.tensor([[1.0, 0], [0, 2.0], [-1.0, 0]])
    assert diversity(features) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_rows_hold_the_means_of_each_prompt():
    shots = shots_of(["a", "b"], 3, seed=0)
    base, tuned = pixels(6, 0), pixels(6, 1)
    features, subject = PixelFeatures(), F.normalize(torch.rand(2, 48), dim=1)
    instruments = Instruments(
        judge=lambda images, prompts: np.array([p == "a" for p in prompts]),
        scorer=lambda images, prompts: torch.tensor([i.getpixel((0, 0))[0] for i in images]),
        features=features,
        subject_features=subject,
    )
    figures = PairedFigures("preserved", instruments)
    for start in (0, 4):  # the second batch continues prompt "b"
        part = slice(start, start + 4)
        figures.add(shots[part], base[part], tuned[part])
    first, second = figures.rows()
    assert (second["group"], second["prompt"], second["images"]) == ("preserved", "b", 3)
    assert (first["accuracy_base"], second["accuracy_tuned"]) == (1, 0)
    assert second["score_tuned"] == pytest.approx(255 * tuned[3:, 0, 0, 0].mean().item())
    assert second["pixel_drift"] == pytest.approx(pixel_drift(base, tuned)[3:].mean().item())
    flat = {side: x.permute(0, 2, 3, 1).flatten(1) for side, x in (("b", base), ("t", tuned))}
    drift = feature_drift(flat["b"], flat["t"])
    assert second["feature_drift"] == pytest.approx(drift[3:].mean().item())
    cosines = F.cosine_similarity(flat["t"][3:, None], subject[None], dim=2)
    assert second["subject_similarity_tuned"] == pytest.approx(cosines.mean().item(), rel=1e-5)
    assert second["diversity_base"] == pytest.approx(diversity(flat["b"][3:]))
    assert torch.allclose(figures.all_features("tuned"), flat["t"])


def test_only_what_has_an_instrument_is_measured():
    figures = PairedFigures("subject", Instruments())
    figures.add(shots_of(["a"], 2, 0), pixels(2, 0), pixels(2, 1))
    (row,) = figures.rows()
    assert list(row) == ["group", "prompt", "images", "pixel_drift"]


def test_one_picture_has_no_diversity():
    figures = PairedFigures("subject", Instruments(features=PixelFeatures()))
    figures.add(shots_of(["a"], 1, 0), pixels(1, 0), pixels(1, 1))
    assert "diversity_base" not in figures.rows()[0]


def test_two_small_pairs_are_kept_for_the_first_prompts():
    figures = PairedFigures("preserved", Instruments(), sheet_prompts=2)
    shots = shots_of(["a", "b", "c"], 3, 0)
    base = pixels(9, 0, size=300)
    figures.add(shots[:5], base[:5], base[:5])
    figures.add(shots[5:], base[5:], base[5:])
    assert [pair.prompt for pair in figures.pairs] == ["a", "a", "b", "b"]
    assert figures.pairs[3].base.size == (256, 256)
    assert not PairedFigures("preserved", Instruments(), sheet_prompts=0).pairs


@pytest.mark.parametrize(
    "verdicts", [[True], [0.5, 1.0], torch.tensor([[True], [True]]), np.array([1, 0]), [None, True]]
)
def test_a_judge_must_give_one_bool_per_picture(verdicts):
    figures = PairedFigures("preserved", Instruments(judge=lambda images, prompts: verdicts))
    with pytest.raises(ValueError, match=r"`judge` must give one finite bool per image \(2\)"):
        figures.add(shots_of(["a"], 2, 0), pixels(2, 0), pixels(2, 1))


@pytest.mark.parametrize("scores", [torch.tensor([1.0, torch.nan]), ["a", "b"], 3.0, [True, False]])
def test_a_scorer_must_give_one_finite_number_per_picture(scores):
    figures = PairedFigures("preserved", Instruments(scorer=lambda images, prompts: scores))
    with pytest.raises(ValueError, match=r"`scorer` must give one finite number per image \(2\)"):
        figures.add(shots_of(["a"], 2, 0), pixels(2, 0), pixels(2, 1))


@pytest.mark.parametrize("found", [torch.zeros(3, 4), torch.zeros(2), torch.tensor([[0.0, 1], [torch.nan, 0]])])
def test_features_must_be_one_finite_row_per_picture(found):
    class Broken:
        def extract(self, images):
            return found

    figures = PairedFigures("preserved", Instruments(features=Broken()))
    with pytest.raises(ValueError, match=r"must give finite features \(images, dim\) for 2 images"):
        figures.add(shots_of(["a"], 2, 0), pixels(2, 0), pixels(2, 1))


def test_pictures_of_two_sizes_are_refused():
    figures = PairedFigures("preserved", Instruments())
    with pytest.raises(ValueError, match=r"pictures of one size, got \(3, 4, 4\) and \(3, 8, 8\)"):
        figures.add([Shot("a", 0, 0)], pixels(1, 0), pixels(1, 0, size=8))
