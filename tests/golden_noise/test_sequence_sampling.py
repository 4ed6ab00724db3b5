from __future__ import annotations

import pytest
import torch

from diffusers_ext.golden_noise.losses import gaussian_nll
from diffusers_ext.golden_noise.networks.sequence_transformer import MOST_LOGVAR
from tests.golden_noise.tiny_sequences import NETWORKS, STEPS, random_network, sequence_and_text

both = pytest.mark.parametrize("name", list(NETWORKS))


@both
def test_sampling_takes_its_generator_and_leaves_the_global_one(name):
    network = random_network(name, predict_variance=True)
    noise, text = sequence_and_text()

    def sample(*seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        count = len(seeds)
        return network.generate_sequence(noise[:count, 0], text[:count], STEPS, generators)

    state = torch.get_rng_state()
    sampled = sample(3, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sampled, sample(3, 4))
    torch.testing.assert_close(sampled[:1], sample(3), atol=1e-5, rtol=1e-5)
    assert (sampled - sample(5, 6)).abs().mean() > 0.1
    one = network.generate_sequence(noise[:, 0], text, STEPS, torch.Generator().manual_seed(3))
    assert not torch.equal(one, network.generate_sequence(noise[:, 0], text, STEPS))


@both
def test_sampled_states_have_the_predicted_mean_and_variance(name):
    network = random_network(name, predict_variance=True)
    noise, text = sequence_and_text(1)
    start, text = noise[:, 0].expand(2000, -1, -1, -1), text.expand(2000, -1, -1)
    generated = network.generate_sequence(start, text, 1, torch.Generator().manual_seed(0))[:, 0]
    prediction = network(start[:1, None], text[:1])
    # The energy is matched afterwards: compare directions, which it leaves alone.
    std = (0.5 * prediction.logvar[0, 0]).exp()
    wanted = prediction.mean[0, 0].square() + std.square()
    found = generated.square().mean(0)
    wanted, found = wanted / wanted.mean(), found / found.mean()
    assert (found - wanted).abs().mean() < 0.06
    mean = generated.mean(0)
    cosine = torch.nn.functional.cosine_similarity(mean.flatten(), prediction.mean.flatten(), 0)
    assert cosine > 0.99


@both
def test_gradients_of_the_likelihood_reach_every_weight(name):
    network = random_network(name, predict_variance=True).train()
    noise, text = sequence_and_text()
    prediction = network(noise, text)
    target = noise.roll(1, 0)
    gaussian_nll(prediction.mean, prediction.logvar, target).backward()
    missing = [key for key, value in network.named_parameters() if value.grad is None]
    assert missing == []
    zero = [key for key, value in network.named_parameters() if not value.grad.any()]
    assert zero == []


@both
def test_logvar_is_bounded(name):
    network = random_network(name, predict_variance=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(40)
    noise, text = sequence_and_text()
    logvar = network(noise, text).logvar
    assert logvar.abs().max() == MOST_LOGVAR
