from __future__ import annotations

import pytest
import torch

from tests.evaluation.golden_subjects import evaluate, moved, small_network, unmoved
from tests.training.stub_rewards import Brightness, BrokenForNine, Constant


class TwoEach(Constant):
    def score(self, images, prompts):
        return torch.ones(len(images), 2)


class Nameless:
    def score(self, images, prompts):
        return torch.ones(len(images))


def cropped(noise, text):
    return noise[..., :-1]


def broken(noise, text):
    return noise * torch.nan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "`prompts` must be a non-empty list of strings, got none"),
        ({"prompts": "a red seven"}, "`prompts` must be a list of prompts, got the string"),
        ({"prompts": ["a", None]}, r"non-empty list of strings, got \[None\]"),
        ({"prompts": ["a red nine"], "rewards": BrokenForNine()}, "'broken' must be numbers, got nan"),
        ({"rewards": TwoEach()}, r"'constant' must have shape \(3,\), one per image, got \(3, 2\)"),
        ({"rewards": []}, "`rewards` must hold at least one reward"),
        ({"rewards": [Brightness()] * 2}, "must differ in name or version, got 'brightness 1' twice"),
        ({"refine": None}, "`refine` must be a golden-noise network or a function"),
        ({"refine": {}}, "`refine` must be a golden-noise network or a function"),
        ({"refine": {"a/b": moved}}, "must have names without '/'"),
        ({"refine": {"best of 4": moved}}, "that do not start with one of .*got 'best of 4'"),
        ({"refine": cropped}, r"finite noise of shape \(1, 4, 8, 8\), got \(1, 4, 8, 7\) from 'golden"),
        ({"refine": broken}, r"got \(1, 4, 8, 8\) with NaN from 'golden'"),
        ({"refine": small_network(64)}, "`prompt_embeds` must be 64 wide for this network, got 128"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be at least 1, got 0"),
        ({"best_of": 0}, "`best_of` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"seeds": []}, "`seeds` must be distinct and not negative, one at least"),
        ({"seeds": [3, 3]}, r"must be distinct and not negative, one at least, got \[3, 3\]"),
        ({"seeds": [-1]}, "`seeds` must be distinct and not negative"),
    ],
)  # fmt: skip
def test_bad_input(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(pipeline, **arguments)


def test_other_kinds_are_refused(pipeline):
    with pytest.raises(TypeError, match=r"got .*Nameless.* without \['name', 'version'\]"):
        evaluate(pipeline, rewards=Nameless())
    with pytest.raises(TypeError, match="must hold golden-noise networks or functions.*got int"):
        evaluate(pipeline, refine={"one": unmoved, "two": 3})


def test_what_does_not_fit_is_found_before_anything_is_drawn(pipeline, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("drawn")

    monkeypatch.setattr(type(pipeline), "__call__", never)
    with pytest.raises(ValueError, match="`refine` must give finite noise"):
        evaluate(pipeline, refine={"good": unmoved, "bad": cropped})


def test_pictures_that_are_not_finite_are_refused(pipeline):
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="must draw finite pictures, got NaN"):
        evaluate(pipeline)
