import pytest
import torch

from diffusers_ext.golden_noise.networks.npnet import (
    apply_in_windows,
    blending_weights,
    continue_noise,
    text_windows,
    window_starts,
)
from diffusers_ext.golden_noise.noise_statistics import noise_statistics


def test_windows_cover_all_and_overlap(subtests):
    for window in [1, 8, 128]:
        for surplus in [0, 1, 5, 24, 130]:
            with subtests.test(window=window, surplus=surplus):
                length = window + surplus
                starts = window_starts(length, window)
                assert starts[0] == 0
                assert starts[-1] == length - window
                most = max(1, window * 3 // 4)
                assert all(0 < b - a <= most for a, b in zip(starts, starts[1:]))


def test_one_window_is_the_function_itself():
    noise = torch.randn(1, 4, 8, 8)
    assert apply_in_windows(lambda x: x * 3, noise, 8).equal(noise * 3)


@pytest.mark.parametrize("size", [(8, 9), (20, 33)])
def test_changes_are_averaged_and_noise_is_not(size):
    noise = torch.randn(2, 4, *size)
    assert torch.equal(apply_in_windows(torch.clone, noise, 8), noise)
    torch.testing.assert_close(apply_in_windows(lambda x: 1.5 * x, noise, 8), 1.5 * noise)
    seen = []
    apply_in_windows(lambda x: seen.append(tuple(x.shape)) or x, noise, 8)
    assert set(seen) == {(2, 4, 8, 8)}


def test_weights_fall_to_the_borders():
    weights = blending_weights(8)
    assert weights.min() > 0
    assert weights.max() == 1
    assert torch.equal(weights, weights.flip(0))
    assert weights[0, 0] < weights[0, 4] < weights[3, 4]


@pytest.mark.parametrize("size", [(16, 7), (5, 6), (1, 40)])
def test_a_short_side_is_continued_and_cropped(size):
    noise, seen = torch.randn(2, 4, *size), []
    found = apply_in_windows(lambda x: seen.append(tuple(x.shape)) or 1.5 * x, noise, 8)
    torch.testing.assert_close(found, 1.5 * noise)
    assert set(seen) == {(2, 4, 8, 8)}


def test_continued_noise_is_white_and_holds_the_noise():
    noise = torch.randn(32, 4, 20, 40, generator=torch.Generator().manual_seed(0))
    continued = continue_noise(noise, 40, 41)
    assert torch.equal(continued[..., 10:30, 0:40], noise)
    around = noise_statistics(continued)
    assert abs(around.std.mean() - 1) < 0.01
    assert abs(around.lag1_correlation.mean()) < 0.01
    assert not torch.equal(continued[0, :, :10], continued[1, :, :10])


def test_the_continuation_is_of_the_sample_and_of_nothing_else():
    noise = torch.randn(3, 4, 6, 6)
    continued = continue_noise(noise, 8, 8)
    torch.manual_seed(1)
    assert torch.equal(continue_noise(noise[1:2], 8, 8), continued[1:2])
    corner = continued[1, :, 0]
    # A sampler's own scale and half precision leave the seed.
    assert torch.equal(continue_noise(14.6 * noise[1:2] / 14.6, 8, 8)[0, :, 0], corner)
    assert torch.equal(continue_noise(noise[1:2].bfloat16(), 8, 8)[0, :, 0], corner.bfloat16())


@pytest.mark.parametrize(
    ("tokens", "starts"), [(7, [0]), (14, [0, 7]), (10, [0, 3]), (15, [0, 4, 8])]
)
def test_texts_are_cut_into_as_few_parts_as_possible(tokens, starts):
    text = torch.arange(tokens).expand(2, tokens)[..., None]
    parts = text_windows(text, 7)
    assert [part[0, 0].item() for part in parts] == starts
    assert all(part.shape == (2, 7, 1) for part in parts)
