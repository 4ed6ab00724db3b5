from __future__ import annotations

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.pairs.dataset import open_pairs
from diffusers_ext.golden_noise.text_cache import TextCache
from diffusers_ext.training.golden_noise.data import NoiseSamples
from diffusers_ext.training.golden_noise.result import NoiseValidation, averaged_weights, measure_pairs
from tests.training.noise_sets import PROMPTS, write_noises

ROWS = {prompt: row for row, prompt in enumerate(PROMPTS)}
CACHE = TextCache(PROMPTS, TextConditioning(torch.ones(4, 3, 16)))
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def network() -> GoldenNoiseModel:
    torch.manual_seed(0)
    return GoldenNoiseModel(sample_size=8, text_embed_dim=16, width=32, num_layers=1, num_heads=2).train()


@pytest.fixture
def validation(network, tmp_path):
    pairs = open_pairs(write_noises(tmp_path / "pairs", count=8))
    samples = NoiseSamples(pairs, range(8), ROWS, [1])
    empty = NoiseSamples(pairs, [], ROWS, [1])
    return NoiseValidation(
        Accelerator(cpu=True), network, None, {"train": samples, "validation": empty},
        CACHE.take, partial(measure_pairs, masked=True), batch_size=3, most=5,
    )  # fmt: skip


def test_averaged_weights_come_and_go_also_after_an_exception(network):
    ema = EMAModel(network.parameters())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ema.shadow_params = [torch.full_like(p, 2.0) for p in ema.shadow_params]
    network.norm.eval()

    def broken():
        with averaged_weights(network, ema):
            assert not network.training
            assert all((p == 2.0).all() for p in network.parameters())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        broken()
    assert all(torch.equal(before[name], v) for name, v in network.state_dict().items())
    assert network.training
    assert not network.norm.training


def test_an_untrained_network_is_the_identity(validation, network):
    state = torch.get_rng_state()
    validation.run(5)
    assert validation.history == [{"step": 5, "train_relative": 1.0, "train_cosine": 0.0}]
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert len(validation.splits["train"]) == 5


def test_a_step_that_is_measured_again_replaces_the_later_ones(validation):
    for step in (2, 4, 6, 4):
        validation.run(step)
    assert [entry["step"] for entry in validation.history] == [2, 4]
    state = validation.state_dict()
    validation.history = []
    validation.load_state_dict(state)
    assert [entry["step"] for entry in validation.history] == [2, 4]
