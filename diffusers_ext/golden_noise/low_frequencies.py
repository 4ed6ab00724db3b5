"""The lowest frequencies of a noise: as a small noise of their own, and changed with all others left alone.

For networks that act on these alone, after LENS (Jeon and Lee, 2026, arXiv:2605.07253): the layout of a picture is
decided by them, and there are few.
"""

from __future__ import annotations

import math

import torch


def cosine_waves(side: int, count: int, device: torch.device | None = None) -> torch.Tensor:
    """The lowest waves of the orthonormal cosine transform (DCT-II), `(min(count, side), side)` float64.

    Wave u is `c cos(pi u (x + 1/2) / side)` with `c = sqrt(2 / side)`, for u = 0 `sqrt(1 / side)`: u half waves along
    the side, whatever its length.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    wave = torch.arange(min(count, side), dtype=torch.float64, device=device)[:, None]
    place = torch.arange(side, dtype=torch.float64, device=device) + 0.5
    scale = torch.where(wave == 0, 1.0, math.sqrt(2.0)) / math.sqrt(side)
    return scale * torch.cos(math.pi * wave * place / side)


def _coarse_rows(side: int, bands: int, device: torch.device) -> torch.Tensor:
    """Orthonormal rows `(min(bands, side), side)`: from a side to a shorter one with the same lowest waves."""
    waves = cosine_waves(side, bands, device)
    return cosine_waves(len(waves), bands, device).T @ waves


def to_coarse(noise: torch.Tensor, bands: int) -> torch.Tensor:
    """A noise of at most `bands` pixels a side whose cosine transform is the lowest block of this noise's.

    White noise stays white, of the same variance, as the rows of the map are orthonormal.
    """
    rows, columns = (_coarse_rows(side, bands, noise.device).to(noise.dtype) for side in noise.shape[-2:])
    return rows @ noise @ columns.T


def from_coarse(coarse: torch.Tensor, size: tuple[int, int], bands: int) -> torch.Tensor:
    """The transpose of `to_coarse`: a picture of this size that has the coarse one's frequencies and no others."""
    rows, columns = (_coarse_rows(side, bands, coarse.device).to(coarse.dtype) for side in size)
    return rows.T @ coarse @ columns


def match_low_frequencies(noise: torch.Tensor, source: torch.Tensor, bands: int) -> torch.Tensor:
    """`source` with the lowest `bands` x `bands` frequencies of `noise`, each ring of them at its energy in `source`.

    What `match_spectrum` does, within the block: its rings are of the Fourier transform, whose waves are no sums of a
    few of the cosine transform's, so it would scale frequencies that nobody changed. Rings are one half wave wide.
    The change is computed in float64 and added once: all other frequencies are the source's but for the rounding of
    that sum, and without a change it is the source to the bit.
    """
    if noise.shape != source.shape or noise.ndim != 4:
        raise ValueError(
            "`noise` must be (batch, channels, height, width) like `source`, got "
            f"{tuple(noise.shape)} and {tuple(source.shape)}."
        )
    rows, columns = (cosine_waves(side, bands, noise.device) for side in noise.shape[-2:])
    found, wanted = (rows @ x.double() @ columns.T for x in (noise, source))
    index = [torch.arange(len(waves), dtype=torch.float64, device=noise.device) for waves in (rows, columns)]
    ring = (index[0][:, None].square() + index[1].square()).sqrt().round().long().flatten()
    energies = [
        x.new_zeros(len(x), int(ring.max()) + 1).index_add_(1, ring, x.square().sum(1).flatten(1))
        for x in (found, wanted)
    ]
    gain = torch.where(energies[0] > 0, (energies[1] / energies[0]).sqrt(), 1.0)[:, ring]
    change = found * gain.view(len(noise), 1, len(rows), len(columns)) - wanted
    return source + (rows.T @ change @ columns).to(source.dtype)
