import math

import pytest
import torch

from diffusers_ext.golden_noise.low_frequencies import cosine_waves, from_coarse, match_low_frequencies, to_coarse

SIZES = [(8, 8), (7, 12), (3, 16), (5, 2)]


def noise(size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(seed))


def coefficients(x: torch.Tensor) -> torch.Tensor:
    rows, columns = (cosine_waves(side, side) for side in x.shape[-2:])
    return rows @ x.double() @ columns.T


def test_the_waves_are_orthonormal_and_the_first_is_the_mean():
    waves = cosine_waves(7, 99)
    torch.testing.assert_close(waves @ waves.T, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(waves[0], torch.full((7,), 1 / math.sqrt(7), dtype=torch.float64))
    torch.testing.assert_close(waves[3, 2], torch.tensor(math.sqrt(2 / 7) * math.cos(math.pi * 3 * 2.5 / 7)).double())
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        cosine_waves(7, 0)


@pytest.mark.parametrize("size", SIZES)
def test_a_coarse_noise_has_the_lowest_block_and_comes_back(size):
    x = noise(size)
    coarse = to_coarse(x, 4)
    rows, columns = (min(4, side) for side in size)
    assert coarse.shape == (2, 4, rows, columns)
    torch.testing.assert_close(coefficients(coarse), coefficients(x)[..., :rows, :columns], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(to_coarse(from_coarse(coarse, size, 4), 4), coarse)


def test_white_noise_stays_white():
    coarse = to_coarse(torch.randn(4000, 1, 9, 6, generator=torch.Generator().manual_seed(1)), 3)
    covariance = coarse.flatten(1).T.cov()
    torch.testing.assert_close(covariance, torch.eye(9), atol=0.08, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_only_the_block_changes_and_its_rings_keep_their_energy(size):
    source, changed = noise(size), 3 * noise(size, seed=1)
    matched = match_low_frequencies(changed, source, 3)
    before, after, other = (coefficients(x) for x in (source, matched, changed))
    outside = torch.ones(size, dtype=torch.bool)
    outside[:3, :3] = False
    # One rounding of a float32 pixel, of size up to 4, is at most 2^-22.
    torch.testing.assert_close(after[..., outside], before[..., outside], atol=2e-6, rtol=0)
    assert (after - before)[..., ~outside].abs().max() > 0.5
    radius = (torch.arange(size[0])[:, None].square() + torch.arange(size[1]).square()).sqrt().round()
    radius[outside] = -1
    for ring in radius[~outside].unique():
        energy = [x[..., radius == ring].square().sum((1, 2)) for x in (before, after)]
        torch.testing.assert_close(*energy, atol=1e-5, rtol=1e-5)
        # Scaled, not turned.
        cosine = torch.cosine_similarity(after[..., radius == ring].flatten(1), other[..., radius == ring].flatten(1))
        torch.testing.assert_close(cosine, torch.ones(2, dtype=torch.float64))


def test_without_a_change_in_the_block_it_is_the_source_to_the_bit():
    source = noise((7, 12))
    assert torch.equal(match_low_frequencies(source.clone(), source, 4), source)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="`noise` must be .* like `source`"):
        match_low_frequencies(noise((8, 8)), noise((8, 7)), 3)
