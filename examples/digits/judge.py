"""Reads digit, glyph and colour from pictures; it has seen real digits and drawn glyphs, never a generated picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC

from diffusers_ext.core.pictures import rgb_picture
from examples.digits.pictures import GLYPHS, draw_glyphs, read_ink, real_digits, tint
from examples.digits.prompts import COLORS, DIGITS, read_prompt


class Reading(NamedTuple):
    """What the judge saw in a batch of pictures."""

    names: list[str]  # digit word or glyph name, one per picture
    colors: list[str]  # nearest tint, one per picture
    probabilities: np.ndarray  # (pictures, classes), columns as in `DigitsJudge.classes`


class DigitsJudge:
    """A support vector machine on 8x8 ink for the shape, the nearest tint for the colour.

    Args:
        glyphs: also know the three drawn glyphs. `False` is the plain judge, trained on the real digits only.
    """

    def __init__(self, glyphs: bool = False) -> None:
        ink, labels = real_digits()
        generator = np.random.default_rng(0)
        shifts = generator.integers(-2, 3, size=(len(ink), 2))
        seen = read_ink(np.stack([tint(i, "white", tuple(s)) for i, s in zip(ink, shifts, strict=True)]))
        seen, labels = (
            np.concatenate([seen, read_ink(np.stack([tint(i, "white") for i in ink]))]),
            np.tile(labels, 2),
        )
        self.classes = list(DIGITS)
        if glyphs:
            for name in GLYPHS:
                drawn = read_ink(np.stack([tint(i, "white") for i in draw_glyphs(name, 180, seed=10_000)]))
                seen, labels = (
                    np.concatenate([seen, drawn]),
                    np.concatenate([labels, [len(self.classes)] * len(drawn)]),
                )
                self.classes.append(name)
        machine = SVC(kernel="rbf", gamma=0.25, C=10.0)
        self._shape = CalibratedClassifierCV(machine, method="sigmoid", ensemble=False, cv=3).fit(
            seen.reshape(len(seen), -1), labels
        )

    def read(self, pictures: np.ndarray | Sequence[Image.Image]) -> Reading:
        """Read pictures `(n, 32, 32, 3)` uint8, or PIL images of that size."""
        pixels = np.stack(
            [np.asarray(rgb_picture(picture) if isinstance(picture, Image.Image) else picture) for picture in pictures]
        )
        if pixels.shape[1:] != (32, 32, 3) or pixels.dtype != np.uint8:
            raise ValueError(f"`pictures` must be 32x32 RGB of 8 bits, got {pixels.shape[1:]} {pixels.dtype}.")
        probabilities = self._shape.predict_proba(read_ink(pixels).reshape(len(pixels), -1))
        names = [self.classes[index] for index in probabilities.argmax(axis=1)]
        return Reading(names, nearest_tints(pixels), probabilities)

    def correct(self, pictures: np.ndarray | Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Whether each picture shows the digit and the colour its prompt names, `(n,)` bool."""
        reading = self.read(pictures)
        right = []
        for name, color, prompt in zip(reading.names, reading.colors, prompts, strict=True):
            wanted_color, wanted_digit = read_prompt(prompt)
            right.append(wanted_digit in (None, name) and wanted_color in (None, color))
        return np.array(right)


def nearest_tints(pixels: np.ndarray) -> list[str]:
    """The tint nearest to the ink's mean colour, for pictures `(n, 32, 32, 3)` uint8."""
    pixels = pixels.astype(np.float32) / 255.0
    weights = pixels.max(axis=-1, keepdims=True) ** 2
    mean = (pixels * weights).sum(axis=(1, 2)) / np.maximum(weights.sum(axis=(1, 2)), 1e-6)
    mean = mean / np.maximum(mean.max(axis=1, keepdims=True), 1e-6)
    tints = np.array(list(COLORS.values()))
    tints = tints / tints.max(axis=1, keepdims=True)
    distances = ((mean[:, None] - tints[None]) ** 2).sum(axis=-1)
    return [list(COLORS)[index] for index in distances.argmin(axis=1)]
