import pytest
import torch

from diffusers_ext.golden_noise.noise_statistics import match_energy, match_spectrum, noise_statistics, radial_spectrum


def white(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_white_noise_is_white():
    statistics = noise_statistics(white(4, 4, 64, 64))
    for value, expected in zip(statistics, (0, 1, 0, 0), strict=True):
        torch.testing.assert_close(value, torch.full((4,), float(expected)), atol=0.05, rtol=0)


def test_each_figure_sees_what_it_names():
    noise = white(2, 4, 64, 64)
    assert torch.allclose(noise_statistics(noise + 0.5).mean, torch.tensor(0.5), atol=0.02)
    assert torch.allclose(noise_statistics(noise * 1.2).std, torch.tensor(1.2), atol=0.02)
    assert (noise_statistics(noise**3).kurtosis > 5).all()
    smooth = (noise + noise.roll(1, -1)) / 2**0.5
    expected = torch.tensor(0.25)  # half along the rows, nothing along the columns
    assert torch.allclose(noise_statistics(smooth).lag1_correlation, expected, atol=0.02)


def test_spectrum_is_flat_for_white_noise_and_not_for_smoothed():
    noise = white(8, 4, 32, 32)
    assert torch.allclose(radial_spectrum(noise), torch.ones(8, dtype=torch.float64), atol=0.2)
    smooth = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    spectrum = radial_spectrum(smooth)
    assert spectrum[0] > 10 * spectrum[-1]


def test_spectrum_conserves_energy():
    noise = white(2, 3, 8, 12)
    power = radial_spectrum(noise, bins=1)
    torch.testing.assert_close(power.item(), noise.double().square().mean().item())


def test_match_energy_leaves_equal_noise_alone_and_scales_the_rest():
    noise = white(3, 4, 8, 8)
    assert torch.equal(match_energy(noise, noise), noise)
    torch.testing.assert_close(match_energy(noise * 3, noise), noise)
    assert match_energy(noise.half(), noise.half()).dtype == torch.float16


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (32, 32)])
def test_match_spectrum_makes_correlated_noise_white_and_keeps_its_phases(size):
    source = white(16, 4, *size)
    # Not circular as the transform is, so not one of its own filters.
    smooth = source + torch.nn.functional.pad(source, (0, 1))[..., 1:]
    matched = match_spectrum(smooth, source)
    torch.testing.assert_close(matched.square().mean((1, 2, 3)), source.square().mean((1, 2, 3)), rtol=1e-4, atol=0)
    before, after = (noise_statistics(x).lag1_correlation.mean().abs() for x in (smooth, matched))
    assert after < before / 2
    agreement = torch.cosine_similarity(
        torch.view_as_real(torch.fft.fft2(matched)), torch.view_as_real(torch.fft.fft2(smooth)), -1
    )
    assert (agreement > 0.99).float().mean() > 0.99


def test_match_spectrum_leaves_equal_noise_alone():
    noise = white(3, 4, 8, 8)
    assert torch.equal(match_spectrum(noise, noise), noise)
    assert match_spectrum(noise.half(), noise.half()).dtype == torch.float16
    flat = torch.ones(1, 1, 4, 4)  # nothing to scale outside of frequency 0
    assert match_spectrum(flat, white(1, 1, 4, 4)).isfinite().all()


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"must be \(batch, channels, height, width\)"):
        noise_statistics(torch.zeros(4, 8, 8))
    with pytest.raises(ValueError, match="with neighbours"):
        noise_statistics(torch.zeros(1, 4, 1, 1))
    with pytest.raises(ValueError, match="must have the shape of `source`"):
        match_energy(torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match="like `source`"):
        match_spectrum(torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match="`bins` must be at least 1"):
        match_spectrum(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), bins=0)
    with pytest.raises(ValueError, match="`bins` must be at least 1"):
        radial_spectrum(torch.zeros(1, 1, 8, 8), bins=0)
