from __future__ import annotations

import pytest
import torch

from diffusers_ext.evaluation.golden_noise_report import NetworkRefiner, RedenoisedTarget, name_subjects
from diffusers_ext.golden_noise.noise_statistics import match_energy, match_spectrum
from diffusers_ext.golden_noise.redenoise import encode_prompts, redenoise_text
from tests.evaluation.golden_subjects import PROMPTS, moved, small_network


@pytest.fixture
def text(pipeline):
    return encode_prompts(pipeline, PROMPTS)


def unit_noise() -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_target_is_redenoised_noise_of_the_same_spectrum(pipeline, text):
    noise, step = unit_noise(), {"num_steps": 4, "w1": 3.0, "w2": 0.5}
    once = match_energy(redenoise_text(pipeline, noise, text, **step), noise)
    found = RedenoisedTarget(pipeline, 1, **step)(noise, text)
    assert torch.allclose(found, match_spectrum(once, noise), atol=1e-6)
    twice = match_energy(redenoise_text(pipeline, once, text, **step), noise)
    found = RedenoisedTarget(pipeline, 2, **step)(noise, text)
    assert torch.allclose(found, match_spectrum(twice, noise), atol=1e-6)
    assert torch.allclose(found.square().mean((1, 2, 3)), noise.square().mean((1, 2, 3)))
    assert (found - noise).abs().max() > 1e-3


def test_a_network_gets_text_mask_and_scale(text):
    network, noise = small_network(), unit_noise()
    found = NetworkRefiner(network, 0.5)(noise, text)
    assert torch.equal(found, network.refine(noise, text.prompt_embeds, scale=0.5))
    assert torch.equal(NetworkRefiner(network, 0.0)(noise, text), noise)


def test_names():
    network = small_network()
    assert list(name_subjects(moved)) == ["golden"]
    found = name_subjects({"a": moved, "b": network}, 0.25)
    assert found["a"] is moved
    assert (found["b"].network, found["b"].scale) == (network, 0.25)


def test_repeats_below_one_are_refused(pipeline):
    with pytest.raises(ValueError, match="`repeats` must be at least 1, got 0"):
        RedenoisedTarget(pipeline, 0)
