import pytest
import torch

from diffusers_ext.golden_noise.windows import apply_in_windows, blending_weights, window_starts


@pytest.mark.parametrize("window", [1, 8, 128])
@pytest.mark.parametrize("surplus", [0, 1, 5, 24, 130])
def test_windows_cover_all_and_overlap(window, surplus):
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


def test_smaller_noise_is_refused():
    with pytest.raises(
        ValueError, match=r"at least 8 high and wide, .* got 16x7.*GoldenNoiseModel"
    ):
        apply_in_windows(torch.clone, torch.randn(1, 4, 16, 7), 8)
