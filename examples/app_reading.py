"""What the judges of the bundled models read in one picture or clip, in words."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from examples.digits.judge import DigitsJudge
from examples.moving_digits.judge import MovingDigitsJudge


@cache
def _pictures() -> DigitsJudge:
    return DigitsJudge(glyphs=True)


@cache
def _clips() -> MovingDigitsJudge:
    return MovingDigitsJudge()


def read_picture(image: Image.Image) -> str:
    """Colour and digit or glyph, and how sure the judge is."""
    reading = _pictures().read([image])
    sure = reading.probabilities.max()
    return f"reads as: {reading.colors[0]} {reading.names[0]} (probability {sure:.2f})"


def read_clip(clip: np.ndarray) -> str:
    """Colour, digit and motion of a clip `(frames, height, width, 3)` uint8."""
    reading = _clips().read(clip[None])
    if reading.digits[0] == "nothing":
        return "reads as: nothing"
    return f"reads as: {reading.colors[0]} {reading.digits[0]} moving {reading.directions[0]}"
