"""Figures of clips by their pixels alone: how much moves and how evenly, how far two clips differ, which are none."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

_SMALLEST_MOTION = 0.1 / 255  # mean change a frame below which a clip stands still
_SMALLEST_SPREAD = 2.0 / 255  # standard deviation of a frame below which it shows one flat colour
_LEAST_CORRELATION = 0.1  # of neighbouring pixels, below which a clip is noise


def motion(clips: np.ndarray) -> np.ndarray:
    """Mean absolute change of a pixel from one of two or more frames to the next; `(n,)` in [0, 1]."""
    return np.abs(np.diff(_levels(clips, 2), axis=1)).mean(axis=(1, 2, 3, 4))


def temporal_smoothness(clips: np.ndarray) -> np.ndarray:
    """How well frames lie between their neighbours, relative to how much happens; `(n,)` in [0, 1].

    `1 - sum |x[t-1] - 2 x[t] + x[t+1]| / sum (|x[t] - x[t-1]| + |x[t+1] - x[t]|)` over all inner frames and all
    windows of a quarter of the shorter side, where `x` is a window's mean: 1 for a clip that fades evenly or stands
    still, 0.6 for a shape that crosses it steadily, about 0.13 for frames that have nothing to do with each other, 0
    for flicker between two pictures. The idea, a frame against what its neighbours say of it, is that of VBench's
    motion smoothness (arXiv 2311.17982) without its interpolation network. The division by the motion keeps a clip
    that hardly moves from being smooth for that reason alone.
    """
    steps = np.diff(_window_means(_levels(clips, 3)), axis=1)
    bends = np.abs(np.diff(steps, axis=1)).sum(axis=(1, 2, 3, 4))
    size = np.abs(steps)
    moved = (size[:, 1:] + size[:, :-1]).sum(axis=(1, 2, 3, 4))
    return np.where(moved > 0, 1 - bends / np.where(moved > 0, moved, 1), 1.0)


def clip_drift(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean absolute difference of the pixels of clips of the same prompts and seeds; `(n,)` in [0, 1]."""
    if base.shape != other.shape:
        raise ValueError(f"`other` must have the shape of `base`, {base.shape}, got {other.shape}.")
    return np.abs(_levels(base) - _levels(other)).mean(axis=(1, 2, 3, 4))


def spatial_correlation(clips: np.ndarray) -> np.ndarray:
    """Correlation of a pixel with its right and lower neighbours: near 1 for pictures, 0 for noise; `(n,)`.

    `1 - mean (x - y)^2 / (2 var)` over both kinds of neighbours and all frames; 1 where all are equal.
    """
    levels = _levels(clips)
    variance = levels.var(axis=(1, 2, 3, 4))
    down = np.square(np.diff(levels, axis=2)).mean(axis=(1, 2, 3, 4))
    right = np.square(np.diff(levels, axis=3)).mean(axis=(1, 2, 3, 4))
    ratio = (down + right) / (4 * np.where(variance > 0, variance, 1))
    return np.where(variance > 0, 1 - ratio, 1.0)


def degenerate_clips(clips: np.ndarray) -> dict[str, np.ndarray]:
    """Which clips are none: a figure may be good for the wrong reason on them.

    `{"blank", "frozen", "noise"}`, each `(n,)` bool: every frame of one flat colour (as black frames of an overflow
    are), nothing moves though there is more than one, or neighbouring pixels that have nothing to do with each other.
    """
    blank = _levels(clips).std(axis=(2, 3)).max(axis=(1, 2)) < _SMALLEST_SPREAD
    noise = ~blank & (spatial_correlation(clips) < _LEAST_CORRELATION)
    still = motion(clips) < _SMALLEST_MOTION if clips.shape[1] > 1 else np.zeros_like(blank)
    return {"blank": blank, "frozen": ~blank & still, "noise": noise}


def _window_means(levels: np.ndarray) -> np.ndarray:
    """Means of half-overlapping square windows, of a quarter of the shorter side."""
    side = max(1, min(levels.shape[2:4]) // 4)
    frames = torch.from_numpy(levels).flatten(0, 1).permute(0, 3, 1, 2)
    means = F.avg_pool2d(frames, side, stride=max(1, side // 2))
    return means.unflatten(0, levels.shape[:2]).numpy()


def _levels(clips: np.ndarray, fewest_frames: int = 1) -> np.ndarray:
    """Clips as float32 in [0, 1]."""
    if clips.ndim != 5 or clips.shape[-1] != 3 or clips.dtype != np.uint8:
        raise ValueError(f"`clips` must be (n, frames, height, width, 3) of 8 bits, got {clips.shape} {clips.dtype}.")
    if clips.shape[1] < fewest_frames:
        raise ValueError(f"`clips` must have {fewest_frames} frames at least, got {clips.shape[1]}.")
    return clips.astype(np.float32) / 255.0
