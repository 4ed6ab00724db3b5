"""A network of one fixed size on larger noise: overlapping windows, blended by their changes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def window_starts(length: int, window: int) -> list[int]:
    """First positions of evenly spread windows that cover `length` and overlap by a quarter or more.

    Args:
        length: at least `window`.
        window: length of one.
    """
    step = max(1, window * 3 // 4)
    count = 1 + math.ceil((length - window) / step)
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]


def blending_weights(window: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`(window, window)` float32: 1 in the middle, falling linearly to the borders, never 0."""
    place = torch.arange(window, device=device)
    side = torch.minimum(place + 1, window - place).float()
    side = side / side.max()
    return side[:, None] * side[None, :]


def apply_in_windows(
    function: Callable[[torch.Tensor], torch.Tensor], noise: torch.Tensor, window: int
) -> torch.Tensor:
    """Apply a function of `window x window` noise to larger noise.

    What the function changes is averaged where windows overlap; the noise itself is never averaged
    nor resized, as either would make neighbours correlate and the variance fall.

    Args:
        function: `(batch, channels, window, window)` to the same shape.
        noise: `(batch, channels, height, width)`, both at least `window`.
        window: side of what the function takes.

    Returns:
        The shape of `noise`.

    Raises:
        ValueError: noise smaller than a window.
    """
    height, width = noise.shape[-2:]
    if min(height, width) < window:
        raise ValueError(
            f"`noise` must be at least {window} high and wide, as the network was made for that "
            f"size and noise is never resized, got {height}x{width}. Make larger pictures or use a "
            "network without a fixed size (`GoldenNoiseModel`)."
        )
    if (height, width) == (window, window):
        return function(noise)
    weights = blending_weights(window, noise.device).to(noise.dtype)
    change, total = torch.zeros_like(noise), noise.new_zeros(height, width)
    for top in window_starts(height, window):
        for left in window_starts(width, window):
            place = (..., slice(top, top + window), slice(left, left + window))
            change[place] += weights * (function(noise[place]) - noise[place])
            total[place] += weights
    return noise + change / total
