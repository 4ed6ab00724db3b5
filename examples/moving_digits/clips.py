"""Scikit-learn's handwritten digits, tinted, crossing a 16x16 canvas in 9 frames."""

from __future__ import annotations

import numpy as np
import torch

from examples.digits.pictures import real_digits
from examples.digits.prompts import COLORS, DIGITS
from examples.moving_digits.prompts import COMBINATIONS, DIRECTIONS

CANVAS, NUM_FRAMES, GRID = 16, 9, 8


def positions(direction: str) -> list[tuple[int, int]]:
    """Top left corner (y, x) of the digit in each frame; the middle frame is centred."""
    dy, dx = DIRECTIONS[direction]
    center, middle = (CANVAS - GRID) // 2, NUM_FRAMES // 2
    return [(center + dy * (f - middle), center + dx * (f - middle)) for f in range(NUM_FRAMES)]


def make_clip(ink: np.ndarray, color: str, direction: str) -> np.ndarray:
    """One ink grid `(8, 8)` in [0, 1] as a clip `(9, 16, 16, 3)` uint8 on black."""
    clip = np.zeros((NUM_FRAMES, CANVAS, CANVAS, 3), dtype=np.float32)
    tinted = ink[..., None] * np.array(COLORS[color], dtype=np.float32)
    for frame, (y, x) in zip(clip, positions(direction), strict=True):
        frame[y : y + GRID, x : x + GRID] = tinted
    return (clip * 255).round().astype(np.uint8)


def follow(clips: np.ndarray, direction: str) -> np.ndarray:
    """What an eye that follows `direction` sees: clips `(n, 9, 16, 16, ...)` cropped to `(n, 9, 8, 8, ...)`."""
    crops = [clips[:, frame, y : y + GRID, x : x + GRID] for frame, (y, x) in enumerate(positions(direction))]
    return np.stack(crops, axis=1)


def to_pixels(clips: np.ndarray) -> torch.Tensor:
    """Clips `(n, frames, height, width, 3)` uint8 as `(n, 3, frames, height, width)` float32 in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def to_clips(videos: np.ndarray | torch.Tensor) -> np.ndarray:
    """A pipeline's frames (`output_type="np"`), `(n, frames, height, width, 3)` in [0, 1], as uint8."""
    return (np.asarray(videos).clip(0, 1) * 255).round().astype(np.uint8)


class MovingDigits:
    """Every real digit in every colour and direction it is trained with, as (ink index, combination index)."""

    def __init__(self, combinations: tuple[tuple[str, str, str], ...] = COMBINATIONS) -> None:
        self.ink, self.labels = real_digits()
        self.combinations = combinations
        self.entries = [
            (i, c)
            for i, label in enumerate(self.labels)
            for c, (_, digit, _) in enumerate(combinations)
            if digit == DIGITS[label]
        ]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.entries[index]

    def clip(self, entry: tuple[int, int]) -> np.ndarray:
        """The clip of one entry, `(9, 16, 16, 3)` uint8."""
        color, _, direction = self.combinations[entry[1]]
        return make_clip(self.ink[entry[0]], color, direction)
