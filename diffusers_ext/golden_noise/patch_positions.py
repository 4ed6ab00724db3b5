"""Positions of image patches in coordinates relative to the picture, for any size and aspect."""

from __future__ import annotations

import math

import torch


def patch_positions(
    rows: int, columns: int, width: int, max_frequency: float, device: torch.device | None = None
) -> torch.Tensor:
    """Sine-cosine position of every patch, from its centre as a fraction of the picture's sides.

    The fixed 2-D form of "Attention Is All You Need" (Vaswani et al., 2017, section 3.5), with
    `u = (index + 0.5) / count` in place of the index: sin and cos of `2 pi f u` per axis, the
    frequencies f spaced geometrically from 1/2 cycle to `max_frequency` cycles a side.

    Args:
        width: length of a position, a multiple of 4.
        max_frequency: half the patches of a side at the size trained at, the finest wave that these
            patches can tell apart. Another size then samples the same waves more or less densely.

    Returns:
        `(rows * columns, width)` float32, row by row.
    """
    if width % 4:
        raise ValueError(f"`width` must be a multiple of 4 for 2-D positions, got {width}.")
    highest = math.log2(max(max_frequency, 0.5))
    frequencies = torch.logspace(-1, highest, width // 4, base=2.0, device=device)
    waves = []
    for count in (rows, columns):
        centres = (torch.arange(count, device=device) + 0.5) / count
        phases = 2 * math.pi * centres[:, None] * frequencies
        waves.append(torch.cat([phases.sin(), phases.cos()], 1))
    grid = (rows, columns, width // 2)
    vertical = waves[0][:, None].expand(grid)
    horizontal = waves[1][None, :].expand(grid)
    return torch.cat([vertical, horizontal], 2).flatten(0, 1)
