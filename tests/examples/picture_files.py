"""Reads pictures and gifs back."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image


def read_frames(path: str | os.PathLike) -> np.ndarray:
    """All frames of a file, `(frames, height, width, 3)` uint8; a picture has one."""
    shown = []
    with Image.open(path) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            shown.append(np.asarray(image.convert("RGB")))
    return np.stack(shown)
