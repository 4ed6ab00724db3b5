"""A network of one fixed size on noise of any size: overlapping windows, blended by their changes.

Noise is never resized: a stretched map has less variance, and its neighbours are correlated. Where a
side is too short, the noise is continued by more white noise, and the result is cropped.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch


def window_starts(length: int, window: int) -> list[int]:
    """First positions of evenly spread windows that cover `length`, overlapping by a quarter or more."""
    step = max(1, window * 3 // 4)
    count = 1 + math.ceil((length - window) / step)
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]


def blending_weights(window: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`(window, window)` float32: 1 in the middle, falling linearly to the borders, never 0."""
    place = torch.arange(window, device=device)
    side = torch.minimum(place + 1, window - place).float()
    side = side / side.max()
    return side[:, None] * side[None, :]


def noise_seed(noise: torch.Tensor) -> int:
    """A seed that one sample's noise stands for: of its signs, which scaling and rounding leave."""
    signs = (noise.detach() > 0).cpu().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(signs).digest()[:8], "little") >> 1


def continue_noise(noise: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The noise in the middle of more white noise, which each sample draws from its own generator.

    The generator's seed is that of the sample's noise (`noise_seed`), so the same noise is continued
    alike in any batch and on any device.
    """
    rows, columns = noise.shape[-2:]
    top, left = (height - rows) // 2, (width - columns) // 2
    drawn = [
        torch.randn(
            noise.shape[1], height, width, generator=torch.Generator().manual_seed(noise_seed(one))
        )
        for one in noise
    ]
    continued = torch.stack(drawn).to(noise)
    continued[..., top : top + rows, left : left + columns] = noise
    return continued


def apply_in_windows(
    function: Callable[[torch.Tensor], torch.Tensor], noise: torch.Tensor, window: int
) -> torch.Tensor:
    """Apply a function of `window x window` noise to noise of any size.

    What the function changes is averaged where windows overlap; the noise itself is never averaged
    nor resized, as either would make neighbours correlate and the variance fall.

    Args:
        noise: `(batch, channels, height, width)`; continued (`continue_noise`) where a side is
            shorter than `window`, and cropped afterwards.
    """
    rows, columns = noise.shape[-2:]
    height, width = max(rows, window), max(columns, window)
    if (height, width) != (rows, columns):
        changed = apply_in_windows(function, continue_noise(noise, height, width), window)
        top, left = (height - rows) // 2, (width - columns) // 2
        return changed[..., top : top + rows, left : left + columns]
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


def text_windows(text: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Parts of `length` tokens that cover a text, as few as possible, evenly spread.

    A multiple of `length` is cut where programs for long prompts join the encodings of its parts.
    """
    tokens = text.shape[1]
    count = math.ceil(tokens / length)
    starts = [round(i * (tokens - length) / max(1, count - 1)) for i in range(count)]
    return [text[:, start : start + length] for start in starts]
