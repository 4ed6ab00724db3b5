"""Targets by a reward, on rewards whose best noise is known."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.noise_statistics import match_spectrum
from diffusers_ext.golden_noise.reward_targets import RewardLoss, ascend_reward, best_neighbour
from diffusers_ext.golden_noise.text_cache import TextCache


def noise(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


WANTED = noise(1, seed=9)


def likeness(x: torch.Tensor) -> torch.Tensor:
    return (x * WANTED).mean((1, 2, 3))


def test_ascent_raises_the_reward_and_keeps_norm_and_spectrum():
    start = noise()
    end = ascend_reward(start, likeness, steps=10, rate=0.05)
    assert (likeness(end) > likeness(start) + 0.2).all()
    change = (end - start).square().mean((1, 2, 3)).sqrt()
    assert (change < 0.5).all()
    torch.testing.assert_close(match_spectrum(end, start), end)
    torch.testing.assert_close(end.square().mean((1, 2, 3)), start.square().mean((1, 2, 3)))
    assert not end.requires_grad


def test_the_best_noise_of_the_way_is_kept():
    # Too long a step overshoots a maximum that lies at the start of the second noise.
    start = noise(2)
    goal = start[1]
    end = ascend_reward(start, lambda x: -(x - goal).square().mean((1, 2, 3)), steps=3, rate=0.3)
    torch.testing.assert_close(end[1], start[1], rtol=0, atol=0)
    assert (end[0] - goal).square().mean() < (start[0] - goal).square().mean()


def test_a_reward_without_a_slope_leaves_the_noise():
    start = noise()
    assert torch.equal(ascend_reward(start, lambda x: 0 * x.sum((1, 2, 3)), steps=2, rate=0.1), start)


def test_every_sample_climbs_by_itself():
    start = noise()
    together = ascend_reward(start, likeness, steps=4, rate=0.05)
    alone = torch.cat([ascend_reward(one[None], likeness, steps=4, rate=0.05) for one in start])
    torch.testing.assert_close(together, alone)


def test_the_best_neighbour_is_chosen_for_every_sample():
    start, others = noise(), [noise(seed=seed) for seed in range(1, 6)]
    chosen = best_neighbour(start, others, likeness, spread=0.6)
    all_of_them = torch.stack([start, *(0.8 * start + 0.6 * other for other in others)])
    best = torch.stack([likeness(x) for x in all_of_them]).argmax(0)
    torch.testing.assert_close(chosen, all_of_them[best, range(3)])
    other_seeds = best_neighbour(start, others, likeness, spread=1.0)
    assert all(any(torch.allclose(x, y) for y in (one, *(o[i] for o in others)))
               for i, (x, one) in enumerate(zip(other_seeds, start, strict=True)))  # fmt: skip


@pytest.mark.parametrize("rate", [0.0, float("nan")])
def test_lengths_must_be_positive(rate):
    with pytest.raises(ValueError, match="`rate` must be positive"):
        ascend_reward(noise(), likeness, steps=1, rate=rate)


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_a_spread_is_a_share(spread):
    with pytest.raises(ValueError, match=r"`spread` must be in \(0, 1\]"):
        best_neighbour(noise(), [], likeness, spread=spread)


def test_the_loss_of_a_reward_does_not_depend_on_its_scale():
    prompts = ["a red seven", "a blue three"]
    text = TextConditioning(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)))
    drawn = []

    def draw(x, text, seeds):
        drawn.append((x.detach(), list(seeds)))
        return x

    def loss(scale: float) -> dict[str, torch.Tensor]:
        function = RewardLoss(
            TextCache(prompts, text), torch.device("cpu"), True, draw,
            lambda pixels, asked: scale * likeness(pixels), 2.0, prompts,
        )  # fmt: skip
        batch = {"noise": noise(2), "text": torch.tensor([0, 1])}
        return function(network, batch, torch.Generator().manual_seed(5))

    network = GoldenNoiseModel(sample_size=8, text_embed_dim=8, width=32, num_layers=1, num_heads=2)
    small, large = loss(1e-6), loss(10.0)
    assert small["loss"].item() == pytest.approx(large["loss"].item(), abs=1e-5)
    assert large["reward"].item() == pytest.approx(1e7 * small["reward"].item(), rel=1e-3)
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert drawn[0][1] == drawn[1][1]
    small["loss"].backward()
    # Untrained the change is none, and what it is pulled to is the gradient alone: of likeness, one direction.
    assert network.head.bias.grad.abs().max() > 0
    assert small["change"] == 0
