from __future__ import annotations

import math

import pytest
import torch

from diffusers_ext.golden_noise.networks.blocks import patch_positions


def test_every_patch_has_its_own_position():
    places = patch_positions(5, 7, 32, 4.0)
    assert places.shape == (35, 32)
    distances = torch.cdist(places, places) + 100 * torch.eye(35)
    assert distances.min() > 0.1


def test_the_first_wave_is_half_a_cycle_a_side():
    places = patch_positions(4, 2, 16, 4.0).unflatten(0, (4, 2))
    centres = (torch.arange(4) + 0.5) / 4
    torch.testing.assert_close(places[:, 0, 0], (math.pi * centres).sin())
    torch.testing.assert_close(places[:, 0, 4], (math.pi * centres).cos())
    torch.testing.assert_close(places[0, :, 3], places[0, :, 3].mean().expand(2))


@pytest.mark.parametrize("factor", [3, 5])
def test_other_sizes_sample_the_same_waves(factor):
    coarse = patch_positions(4, 6, 16, 3.0).unflatten(0, (4, 6))
    fine = patch_positions(4 * factor, 6 * factor, 16, 3.0).unflatten(0, (4 * factor, 6 * factor))
    middle = factor // 2
    torch.testing.assert_close(fine[middle::factor, middle::factor], coarse, atol=1e-5, rtol=1e-5)


def test_a_single_patch():
    assert patch_positions(1, 1, 8, 0.5).isfinite().all()


def test_widths_that_are_no_multiple_of_four_are_refused():
    with pytest.raises(ValueError, match="`width` must be a multiple of 4 .*, got 6"):
        patch_positions(2, 2, 6, 1.0)
