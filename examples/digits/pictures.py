"""Scikit-learn's handwritten digits as tinted 32x32 pictures, and glyphs drawn in the same manner."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from examples.digits.prompts import COLORS

IMAGE_SIZE, _GRID = 32, 8
GLYPHS: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    # Strokes as polylines in a unit square, y downwards; none resembles a digit.
    "triangle": (((0.5, 0.05), (0.95, 0.92), (0.05, 0.92), (0.5, 0.05)),),
    "cross": (((0.08, 0.08), (0.92, 0.92)), ((0.92, 0.08), (0.08, 0.92))),
    "comb": (((0.05, 0.05), (0.05, 0.92), (0.95, 0.92), (0.95, 0.05)), ((0.5, 0.1), (0.5, 0.92))),
}


def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """All 1,797 digits: ink `(n, 8, 8)` float32 in [0, 1], labels `(n,)` int."""
    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target


def draw_glyphs(name: str, count: int, seed: int) -> np.ndarray:
    """Hand-drawn looking variants of one glyph on the digits' own 8x8 grid.

    Returns:
        Ink `(count, 8, 8)` float32 in [0, 1].
    """
    if name not in GLYPHS:
        raise ValueError(f"`name` must be one of {sorted(GLYPHS)}, got {name!r}.")
    generator = np.random.default_rng([seed, sorted(GLYPHS).index(name)])
    return np.stack([_draw(GLYPHS[name], generator) for _ in range(count)])


def _draw(strokes: tuple, generator: np.random.Generator) -> np.ndarray:
    canvas_size = 256
    canvas = Image.new("L", (canvas_size, canvas_size))
    pen = ImageDraw.Draw(canvas)
    angle, scale = generator.uniform(-0.12, 0.12), generator.uniform(0.62, 0.78)
    center = 0.5 + generator.uniform(-0.04, 0.04, size=2)
    width = int(generator.uniform(26, 36))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    for stroke in strokes:
        points = np.array(stroke) - 0.5 + generator.normal(0, 0.025, size=(len(stroke), 2))
        points = ((points * scale) @ turn.T + center) * canvas_size
        pen.line([tuple(point) for point in points], fill=255, width=width, joint="curve")
    # Area average and a gain: the scanner of the digits counted ink per 4x4 block, which saturates within a stroke.
    ink = np.asarray(canvas.resize((_GRID, _GRID), Image.Resampling.BOX), dtype=np.float32) / 255.0
    return np.clip(ink * 1.5, 0, 1)


def tint(ink: np.ndarray, color: str, shift: tuple[int, int] = (0, 0)) -> np.ndarray:
    """One ink grid `(8, 8)` as an RGB picture `(32, 32, 3)` uint8 on black, moved by whole pixels."""
    large = Image.fromarray(ink.astype(np.float32)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    pixels = np.clip(np.asarray(large), 0, 1)[..., None] * np.array(COLORS[color], dtype=np.float32)
    padded = np.zeros_like(pixels)
    dy, dx = shift
    source = pixels[max(-dy, 0) : IMAGE_SIZE - max(dy, 0), max(-dx, 0) : IMAGE_SIZE - max(dx, 0)]
    padded[max(dy, 0) : max(dy, 0) + source.shape[0], max(dx, 0) : max(dx, 0) + source.shape[1]] = source
    return (padded * 255).round().astype(np.uint8)


def read_ink(pictures: np.ndarray) -> np.ndarray:
    """Ink grids `(n, 8, 8)` in [0, 1] of RGB pictures `(n, 32, 32, 3)` uint8: brightest channel, area average."""
    brightness = pictures.max(axis=-1).astype(np.float32) / 255.0
    block = IMAGE_SIZE // _GRID
    return brightness.reshape(-1, _GRID, block, _GRID, block).mean(axis=(2, 4))
