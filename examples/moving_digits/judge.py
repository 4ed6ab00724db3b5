"""Reads digit, colour and motion from clips; it has seen real digits only, never a generated clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

from examples.digits.judge import nearest_tints
from examples.digits.pictures import real_digits
from examples.digits.prompts import DIGITS
from examples.moving_digits.clips import CANVAS, NUM_FRAMES, follow
from examples.moving_digits.prompts import DIRECTIONS, read_prompt

NOTHING = "nothing"
_LEAST_INK = 4.0  # sum over 64 cells in [0, 1]; real digits have 10 to 29


class ClipReading(NamedTuple):
    """What the judge saw in a batch of clips, one entry a clip."""

    digits: list[str]  # a digit word, or "nothing" where there is almost no ink
    colors: list[str]
    directions: list[str]
    distances: np.ndarray  # (clips,) Euclidean, from the followed ink to the nearest real digit; cells 0..16


class MovingDigitsJudge:
    """Follows each direction, takes the one in which ink stays in place, reads the mean ink with an SVM."""

    name, version, concept_aspect = "moving digits", "1", "digit"

    def __init__(self) -> None:
        ink, labels = real_digits()
        soft = gaussian_filter(ink, (0, 0.5, 0.5))  # as decoders draw
        seen = np.concatenate([ink, soft]).reshape(2 * len(ink), -1)
        self._shape = SVC(kernel="rbf", gamma=0.25, C=10.0).fit(seen, np.tile(labels, 2))
        self._nearest = NearestNeighbors(n_neighbors=1).fit(16 * ink.reshape(len(ink), -1))

    def read(self, clips: np.ndarray) -> ClipReading:
        """Read clips `(n, 9, 16, 16, 3)` uint8."""
        if clips.shape[1:] != (NUM_FRAMES, CANVAS, CANVAS, 3) or clips.dtype != np.uint8:
            raise ValueError(
                f"`clips` must be (n, {NUM_FRAMES}, {CANVAS}, {CANVAS}, 3) of 8 bits, got {clips.shape} {clips.dtype}."
            )
        brightness = clips.max(axis=-1).astype(np.float32) / 255.0
        followed = np.stack([follow(brightness, d).mean(axis=1) for d in DIRECTIONS])
        best = (followed**2).sum(axis=(2, 3)).argmax(axis=0)  # ink that moves otherwise is smeared
        ink = followed[best, np.arange(len(clips))].reshape(len(clips), -1)
        digits = [DIGITS[label] for label in self._shape.predict(ink)]
        digits = [d if i.sum() >= _LEAST_INK else NOTHING for d, i in zip(digits, ink, strict=True)]
        colors = nearest_tints(clips.reshape(len(clips), -1, CANVAS, 3))
        directions = [list(DIRECTIONS)[index] for index in best]
        return ClipReading(digits, colors, directions, self._nearest.kneighbors(16 * ink)[0][:, 0])

    def correct(self, clips: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """What each clip shows of what its prompt names.

        Returns:
            `digit`, `color`, `direction`: bool, masked where the prompt names none; `reads_as` and
            `reads_as_color`: words; `ink_distance`: to the nearest real digit. Each `(n,)`.
        """
        reading, wanted = self.read(clips), [read_prompt(prompt) for prompt in prompts]
        seen = {"digit": reading.digits, "color": reading.colors, "direction": reading.directions}
        found: dict[str, np.ndarray] = {}
        for kind, values in seen.items():
            asked = [getattr(one, kind) for one in wanted]
            right = [word == value for word, value in zip(asked, values, strict=True)]
            found[kind] = np.ma.array(right, mask=[word is None for word in asked])
        return {
            **found,
            "reads_as": np.array(reading.digits),
            "reads_as_color": np.array(reading.colors),
            "ink_distance": reading.distances.astype(np.float64),
        }
