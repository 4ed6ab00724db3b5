from __future__ import annotations

import pytest
import torch
from PIL import Image

from diffusers_ext.rewards import checked_scores

IMAGES = [Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "red")]
PROMPTS = ["black", "red"]


class Fixed:
    """Gives what it was made with."""

    name, version = "fixed", "1"

    def __init__(self, scores) -> None:
        self.scores = scores

    def score(self, images, prompts):
        return self.scores


@pytest.mark.parametrize("scores", [[1, 2], torch.tensor([1.0, 2.0], dtype=torch.float64)])
def test_scores_come_back_as_float32(scores):
    found = checked_scores(Fixed(scores), IMAGES, PROMPTS)
    assert found.dtype == torch.float32
    assert found.tolist() == [1, 2]


def test_scores_carry_no_graph():
    scores = torch.ones(2, requires_grad=True) * 2
    assert not checked_scores(Fixed(scores), IMAGES, PROMPTS).requires_grad


@pytest.mark.parametrize("scores", [torch.zeros(3), torch.zeros(2, 1), torch.tensor(1.0)])
def test_another_shape_is_refused(scores):
    with pytest.raises(ValueError, match=r"scores of 'fixed' must have shape \(2,\), one per"):
        checked_scores(Fixed(scores), IMAGES, PROMPTS)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_no_number_is_refused_with_its_prompt(value):
    with pytest.raises(ValueError, match=f"got {value} for 1 of 2 pictures, .* prompt 'red'"):
        checked_scores(Fixed([0.5, float(value)]), IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("images", "prompts", "error", "message"),
    [
        ([], [], ValueError, "`images` must hold at least one picture, got none"),
        (IMAGES, ["black"], ValueError, r"one prompt per image \(2\), got \['black'\]"),
        (IMAGES, "no", ValueError, r"one prompt per image \(2\), got 'no'"),
        (IMAGES[:1], PROMPTS, ValueError, r"one prompt per image \(1\)"),
        (IMAGES, ["black", None], TypeError, "`prompts` must hold str only, got NoneType"),
        ([IMAGES[0], "red.png"], PROMPTS, TypeError, "`images` must hold Image only, got str"),
    ],
)
def test_wrong_pairs_are_refused(images, prompts, error, message):
    with pytest.raises(error, match=message):
        checked_scores(Fixed([1.0, 2.0]), images, prompts)
