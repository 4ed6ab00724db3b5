from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from diffusers_ext.training.golden_noise.data import WithoutPromptMeans


class Pairs(Dataset):
    """Two steps for three prompts of four noises each; their changes share a mean."""

    num_steps, latent_shape, facts = 2, (2, 4, 4), None

    def __init__(self, prompts: tuple[str, ...] = ("a", "b", "c"), noises: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)
        self.prompts = [prompt for prompt in prompts for _ in range(noises)]
        shape = len(self.prompts), *self.latent_shape
        self.noise = torch.randn(shape, generator=generator)
        mean = torch.randn(len(prompts), 1, 2, *self.latent_shape, generator=generator)
        own = 0.4 * torch.randn(len(prompts), noises, 2, *self.latent_shape, generator=generator)
        self.changes = (mean + own).flatten(0, 1)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict:
        noise = self.noise[index]
        golden = noise + self.changes[index]
        return {"noise": noise, "golden": golden, "prompt": self.prompts[index]}


def common_part(pairs: Dataset) -> float:
    """Length of the mean change of the first prompt, relative to its changes."""
    changes = torch.stack([pairs[i]["golden"] - pairs[i]["noise"] for i in range(4)])
    return (changes.mean(0).norm() / changes.flatten(1).norm(dim=1).mean()).item()


def test_the_mean_of_the_other_noises_is_taken_out():
    pairs = Pairs()
    found = WithoutPromptMeans(pairs, 0.5)[1]
    others = pairs.changes[[0, 2, 3]].mean(0)
    expected = pairs.noise[1] + pairs.changes[1] - 0.5 * others
    scale = pairs.noise[1].norm() / expected.flatten(1).norm(dim=1)
    torch.testing.assert_close(found["golden"], expected * scale[:, None, None, None])
    assert torch.equal(found["noise"], pairs.noise[1])
    assert found["prompt"] == "a"


def test_pictures_of_a_prompt_change_less_alike():
    pairs = Pairs()
    assert common_part(pairs) > 0.9
    assert common_part(WithoutPromptMeans(pairs, 0.7)) < common_part(pairs) - 0.05
    assert common_part(WithoutPromptMeans(pairs, 1.0)) < 0.5


def test_energy_is_that_of_the_noise():
    pairs = WithoutPromptMeans(Pairs(), 1.0)
    for item in (pairs[0], pairs[7]):
        energies = item["golden"].square().mean((1, 2, 3))
        torch.testing.assert_close(energies, item["noise"].square().mean().expand(2))


def test_what_describes_the_data_stays():
    pairs = Pairs()
    without = WithoutPromptMeans(pairs, 0.3)
    assert len(without) == 12
    assert without.prompts == pairs.prompts
    assert (without.num_steps, without.latent_shape) == (2, (2, 4, 4))


@pytest.mark.parametrize("share", [-0.1, 0.0, 1.5])
def test_share_must_be_one(share):
    with pytest.raises(ValueError, match=r"`remove_prompt_mean` must be in \(0, 1\], got"):
        WithoutPromptMeans(Pairs(), share)


def test_a_single_noise_has_no_mean():
    with pytest.raises(ValueError, match="several noises of every prompt .* got one of 'a' and 2"):
        WithoutPromptMeans(Pairs(noises=1), 0.5)
