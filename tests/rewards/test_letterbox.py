from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.rewards.hpsv2 import CLIP_MEAN, CLIP_STD, letterbox
from tests.rewards.hpsv2_fixtures import official_tensors, picture


STEP = 4  # the fixture holds every fourth row and column
# (top, left, height, width) of the picture in the square
BOXES = {
    "rgb": (37, 0, 149, 224),
    "gray": (0, 37, 224, 149),
    "rgba": (33, 0, 158, 224),
    "small": (32, 0, 159, 224),
}
BLACK = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation."""
    return pixels * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]


@pytest.mark.parametrize(
    ("name", "key", "antialias"),
    [
        ("rgb", "pixel_values.rgb", True),
        ("gray", "pixel_values.gray", True),
        ("small", "pixel_values.small", True),
        ("rgba", "pixel_values.rgba_4ch", True),
        ("rgb", "pixel_values_no_antialias.rgb", False),
    ],
)
def test_pixels_are_the_official_ones(name, key, antialias):
    # The official code fails on an alpha channel; what it makes of the others is in the fixture.
    found = letterbox(picture(name).convert("RGB"), antialias=antialias)
    assert found.shape == (3, 224, 224)
    assert found.dtype == torch.float32
    expected = official_tensors()[key].float()
    assert torch.allclose(found[:, ::STEP, ::STEP], expected, atol=2e-3, rtol=0)


def test_pictures_are_read_as_they_look():
    grey = np.full((40, 40), 20000, np.uint16)
    grey[10:30, 10:30] = 50000
    shown = Image.fromarray(np.round(grey / 257).astype(np.uint8))
    assert torch.equal(letterbox(Image.fromarray(grey)), letterbox(shown))
    cut_out = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    assert torch.equal(letterbox(cut_out), letterbox(Image.new("RGB", (40, 40), "white")))


def test_antialiasing_changes_the_pixels():
    difference = letterbox(picture("rgb")) - letterbox(picture("rgb"), antialias=False)
    assert difference.abs().max() > 0.5


@pytest.mark.parametrize("name", BOXES)
def test_the_whole_picture_lies_on_black(name):
    top, left, height, width = BOXES[name]
    found = letterbox(picture(name))
    inside = torch.zeros(224, 224, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert torch.equal(found[:, ~inside], BLACK[:, None].expand(-1, int((~inside).sum())))
    edges = found[:, top, left + width // 2], found[:, top + height - 1, left + width // 2]
    assert all((edge - BLACK).abs().max() > 0.05 for edge in edges)


def test_overshoots_of_the_bicubic_filter_are_kept():
    step = np.zeros((40, 40, 3), dtype=np.uint8)
    step[:, 20:] = 255
    values = to_unit(letterbox(Image.fromarray(step)))
    assert values.min() < -0.01
    assert values.max() > 1.01


@pytest.mark.parametrize("size", [(224, 224), (224, 100), (31, 224)])
def test_a_picture_of_the_right_length_is_not_resized(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    values = to_unit(letterbox(Image.fromarray(pixels)))
    top, left = (224 - size[1]) // 2, (224 - size[0]) // 2
    found = values[:, top : top + size[1], left : left + size[0]]
    assert torch.allclose(found, torch.from_numpy(pixels).permute(2, 0, 1) / 255, atol=1e-6)


def test_a_line_of_pixels_stays_a_line():
    values = to_unit(letterbox(Image.new("RGB", (1000, 1), "white")))
    assert values.amax((0, 2)).gt(0.5).nonzero().flatten().tolist() == [111]
