"""Checks that a picture is drawn and can be read."""

from __future__ import annotations

import numpy as np
from PIL import Image


def assert_picture(path, width: int, height: int) -> None:
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    assert pixels.shape[0] >= height
    assert pixels.shape[1] >= width
    assert pixels.std() > 10
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def assert_no_overlap(figure, texts) -> None:
    """No label covers another one, or leaves the figure."""
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) > 1
    for index, box in enumerate(boxes):
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:index])
