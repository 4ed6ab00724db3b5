"""Pairs and networks that a reward asks for: the gradient through the pipeline's own call, targets, a training."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.families import find_family
from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.redenoise import encode_prompts
from diffusers_ext.training.golden_noise.rendering import draw_with_gradient, render
from diffusers_ext.training.golden_noise.settings import PairSettings
from diffusers_ext.training.pairs import PairMaker, list_candidates
from diffusers_ext.training.pairs import main as generate
from examples.digits.check_model import MODEL_DIR
from tests.golden_noise.golden_pipelines import FAMILIES
from tests.tiny_digits import random_digits_pipeline
from tests.training.noise_runs import noise_line
from tests.training.stub_rewards import Brightness, DifferentiableBrightness
from training import train_npnet

SHAPE = (4, 8, 8)
SETTINGS = PairSettings(
    prompt_file="prompts.txt", output_dir="out", num_inference_steps=2, guidance_scale=1.0, ascent_steps=4,
    ascent_rate=0.1, best_of=3,
)  # fmt: skip
PROMPTS = ["a red seven", "a blue three"]
LIGHT = "tests.training.stub_rewards:DifferentiableBrightness"


@pytest.fixture(scope="module")
def pipeline():
    return random_digits_pipeline()


def test_drawing_with_a_gradient_draws_the_same(pipeline):
    noise, text = torch.randn(2, *SHAPE, requires_grad=True), encode_prompts(pipeline, PROMPTS)
    hooks = dict(pipeline.unet._forward_hooks)
    slopes = {}
    for steps in (None, 1):
        pixels = draw_with_gradient(pipeline, noise, text, SETTINGS, [1, 2], steps)
        images = render(pipeline, noise.detach(), text, SETTINGS, [1, 2])
        wanted = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(pixels.detach(), wanted, atol=1 / 255, rtol=0)
        (slopes[steps],) = torch.autograd.grad(pixels.sum(), noise)
        assert slopes[steps].isfinite().all()
        assert slopes[steps].abs().max() > 0
    # The first of two steps counts in one of them alone.
    assert not torch.allclose(slopes[None], slopes[1])
    assert dict(pipeline.unet._forward_hooks) == hooks


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_draws_with_a_gradient(family):
    pipeline, pixels = FAMILIES[family].plain(), FAMILIES[family].pixels
    size = pixels // pipeline.vae_scale_factor
    channels = find_channels(pipeline)
    noise = torch.randn(1, channels, size, size, requires_grad=True)
    drawn = draw_with_gradient(pipeline, noise, encode_prompts(pipeline, PROMPTS[:1]), SETTINGS, [1])
    (slope,) = torch.autograd.grad(drawn.sum(), noise)
    assert slope.isfinite().all()
    assert slope.abs().max() > 0


def find_channels(pipeline) -> int:
    return find_family(pipeline, "golden_noise").network_sizes(denoiser_of(pipeline).config).in_channels


@pytest.mark.parametrize(("target", "reward"), [("reward", DifferentiableBrightness()), ("best_of_n", Brightness())])
def test_pairs_of_a_reward_are_brighter(pipeline, target, reward):
    settings = dataclasses.replace(SETTINGS, target=target, num_steps=2)
    batch = list_candidates(PROMPTS, 2, seed=0)
    part = PairMaker(pipeline, SHAPE, settings, reward).make(batch)
    assert len(part.pairs) >= 3  # of four; the best neighbour may be the noise itself
    assert all(record.reward_golden > record.reward_source for record in part.pairs)
    assert part.deltas.shape == (len(part.pairs), 2, *SHAPE)
    again = PairMaker(pipeline, SHAPE, dataclasses.replace(settings, no_filter=True), reward).make(batch[1:3])
    assert [record.reward_golden for record in again.pairs] == [None, None]
    kept = [record.index for record in part.pairs]
    mine = [i for i, record in enumerate(part.pairs) if record.index in (1, 2)]
    torch.testing.assert_close(
        again.deltas[[kept[i] - 1 for i in mine]].float(), part.deltas[mine].float(), atol=4e-3, rtol=0
    )
    assert all(0.9 < record.std < 1.1 for record in part.pairs)


def test_pairs_of_diversity_are_filtered_by_the_reward(pipeline):
    settings = dataclasses.replace(SETTINGS, target="diversity", margin=-0.05)
    batch = list_candidates(PROMPTS, 4, seed=0)
    part = PairMaker(pipeline, SHAPE, settings, Brightness()).make(batch)
    gains = [record.reward_golden - record.reward_source for record in part.pairs]
    assert all(found > -0.05 for found in gains)
    assert min(gains) < 0
    assert len(part.pairs) + len(part.rejected) == len(batch)
    assert part.deltas.float().square().mean().sqrt() > 0.05
    free = dataclasses.replace(settings, no_filter=True)
    assert not free.needs_reward
    assert len(PairMaker(pipeline, SHAPE, free, None).make(batch).pairs) == len(batch)


def test_a_reward_without_a_gradient_is_refused_by_name(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red seven\n")
    prompts, reward = str(tmp_path / "prompts.txt"), f"{Brightness.__module__}:Brightness"
    common = {"pretrained_model_name_or_path": "nothing", "reward": reward, "prompt_file": prompts}
    with pytest.raises(ValueError, match="`reward` must be differentiable for this target.*'brightness'"):
        generate(PairSettings(output_dir=str(tmp_path / "pairs"), target="reward", **common))
    line = noise_line("golden_noise_model", None, tmp_path / "network", objective="reward", **common)
    with pytest.raises(ValueError, match="`reward` must be differentiable for this target.*'brightness'"):
        train_npnet.main(train_npnet.parse_args(line))


@pytest.mark.parametrize("given", ["--dataset_dir d --objective reward", "--prompt_file p"])
def test_the_data_must_be_those_of_the_objective(given):
    with pytest.raises(ValueError, match="must be given with `--objective"):
        train_npnet.parse_args([*given.split(), "--pretrained_model_name_or_path", "b", "--output_dir", "o"])


def test_a_network_learns_what_a_reward_likes(tmp_path):
    prompts = [f"a {color} {digit}" for color in ("red", "green", "blue") for digit in ("one", "two", "three", "four")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    line = noise_line(
        "golden_noise_model", None, tmp_path / "network", objective="reward", prompt_file=tmp_path / "prompts.txt",
        pretrained_model_name_or_path=MODEL_DIR, reward=LIGHT, num_inference_steps=2, guidance_scale=1.0,
        max_train_steps=12, learning_rate=2e-2, validation_split=0.2, reward_regularization=1.0,
    )  # fmt: skip
    folder = train_npnet.main(train_npnet.parse_args(line))
    report = json.loads((folder / "training_report.json").read_text())
    figures = report["validation"][-1]
    assert figures["validation_gain"] > 1.0  # of 255
    assert figures["validation_wins"] > 0.8
    assert report["data"]["generation"]["reward"] == {"name": "brightness", "version": "1"}
    network = load_noise_model(folder)
    assert network.config.in_channels == 4
