"""How white a noise is, and how a changed noise gets the energy of the noise it came from."""

from __future__ import annotations

from typing import NamedTuple

import torch


class NoiseStatistics(NamedTuple):
    """Per sample, float32 `(batch,)`; white Gaussian noise has 0, 1, 0, 0."""

    mean: torch.Tensor
    std: torch.Tensor  # around the mean
    kurtosis: torch.Tensor  # excess: fourth central moment over squared variance, less 3
    lag1_correlation: torch.Tensor  # of horizontal and vertical neighbours


def noise_statistics(noise: torch.Tensor) -> NoiseStatistics:
    """Moments and neighbour correlation of each noise of a batch."""
    if noise.ndim != 4 or noise.shape[-2] * noise.shape[-1] < 2:
        raise ValueError(
            f"`noise` must be (batch, channels, height, width) with neighbours, got {tuple(noise.shape)}."
        )
    noise = noise.float()
    mean = noise.mean((1, 2, 3), keepdim=True)
    centred = noise - mean
    variance = centred.square().mean((1, 2, 3))
    products = [
        (centred[..., 1:] * centred[..., :-1]).flatten(1),
        (centred[..., 1:, :] * centred[..., :-1, :]).flatten(1),
    ]
    return NoiseStatistics(
        mean.flatten(),
        variance.sqrt(),
        centred.pow(4).mean((1, 2, 3)) / variance.square() - 3,
        torch.cat(products, 1).mean(1) / variance,
    )


def radial_spectrum(noise: torch.Tensor, bins: int = 8) -> torch.Tensor:
    """Mean power per ring of spatial frequency, over all samples and channels, float64; 1 for white unit noise.

    Rings are of equal width from frequency 0 to 0.5 cycles a latent pixel (corners beyond 0.5 count with the last);
    those without a frequency are NaN.
    """
    if bins < 1:
        raise ValueError(f"`bins` must be at least 1, got {bins}.")
    power = torch.fft.fft2(noise.double(), norm="ortho").abs().square().mean((0, 1))
    ring = (_radius(noise) / 0.5 * bins).long().clamp(max=bins - 1).flatten()
    total = torch.zeros(bins, dtype=torch.float64, device=power.device)
    total.index_add_(0, ring, power.flatten())
    return total / torch.bincount(ring, minlength=bins)


def match_energy(noise: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Scale each noise to the mean square of the noise it was made from.

    A sampler expects unit variance; the source's own mean square (and not 1) is what leaves an unchanged noise
    unchanged to the bit.
    """
    if noise.shape != source.shape:
        raise ValueError(
            f"`noise` must have the shape of `source`, got {tuple(noise.shape)} and {tuple(source.shape)}."
        )
    dims = tuple(range(1, noise.ndim))
    wanted, found = (x.double().square().mean(dims, keepdim=True) for x in (source, noise))
    return noise * (wanted / found).sqrt().to(noise.dtype)


def match_spectrum(noise: torch.Tensor, source: torch.Tensor, bins: int = 8) -> torch.Tensor:
    """Scale every ring of spatial frequency to the energy it has in the noise it was made from.

    A prompt asks for large shapes, which golden noise writes into the low frequencies: neighbours become correlated.
    Their phases hold the shape; their energy can be put back, and with it whiteness and variance. Noise equal to its
    source stays as it is to the bit. The first of the `bins` up to 0.5 cycles a latent pixel is half as wide.
    """
    if noise.shape != source.shape or noise.ndim != 4:
        raise ValueError(
            "`noise` must be (batch, channels, height, width) like `source`, got "
            f"{tuple(noise.shape)} and {tuple(source.shape)}."
        )
    if bins < 1:
        raise ValueError(f"`bins` must be at least 1, got {bins}.")
    ring = (_radius(noise) / 0.5 * bins).round().long().clamp(max=bins).flatten()
    waves = [torch.fft.fft2(x.double(), norm="ortho") for x in (noise, source)]
    found, wanted = (
        x.new_zeros(len(x), bins + 1, dtype=torch.float64).index_add_(1, ring, x.abs().square().sum(1).flatten(1))
        for x in waves
    )
    gain = torch.where(found > 0, (wanted / found).sqrt(), 1.0)[:, ring]
    # The change alone goes back through the transform, so that no change stays none.
    change = waves[0] * (gain.view(len(noise), 1, *noise.shape[-2:]) - 1)
    return noise + torch.fft.ifft2(change, norm="ortho").real.to(noise.dtype)


def _radius(noise: torch.Tensor) -> torch.Tensor:
    """Distance of each frequency of `fft2` from 0, `(height, width)` float64, in cycles a pixel."""
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64, device=noise.device) for side in noise.shape[-2:])
    return (rows[:, None].square() + columns[None, :].square()).sqrt()
