"""What the app says it reads, on real digits."""

from __future__ import annotations

import numpy as np
from PIL import Image

from examples.app_reading import read_clip, read_picture
from examples.digits.pictures import draw_glyphs, real_digits, tint
from examples.digits.prompts import DIGITS
from examples.moving_digits.clips import make_clip


def test_colour_digit_and_probability_of_a_picture():
    ink, labels = real_digits()
    reading = read_picture(Image.fromarray(tint(ink[7], "red")))
    assert reading.startswith(f"reads as: red {DIGITS[labels[7]]} (probability 0.9")


def test_a_glyph_is_read_by_its_name():
    [ink] = draw_glyphs("triangle", 1, seed=3)
    assert read_picture(Image.fromarray(tint(ink, "white"))).startswith("reads as: white triangle")


def test_colour_digit_and_motion_of_a_clip():
    ink, labels = real_digits()
    clip = make_clip(ink[4], "green", "up")
    assert read_clip(clip) == f"reads as: green {DIGITS[labels[4]]} moving up"
    assert read_clip(np.zeros_like(clip)) == "reads as: nothing"
