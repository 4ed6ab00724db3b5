from __future__ import annotations

from PIL import Image

from examples.digits.subject_sheet import subject_sheet


def test_a_block_per_model_and_a_row_per_group():
    colors = {"base": ["red"] * 3, "taught": ["green", "blue", "green"]}
    images = {
        name: {group: [Image.new("RGB", (32, 32), c) for c in given] for group in ("old", "new")}
        for name, given in colors.items()
    }
    sheet = subject_sheet(images, {"old": ("old digits", 2), "new": ("the glyph", 1)})
    alone = subject_sheet({"base": images["base"]}, {"old": ("old digits", 2)})
    assert sheet.width == alone.width
    assert sheet.height > 2 * alone.height
    counted = dict(zip(("red", "green", "blue"), (5, 4, 1), strict=True))  # of 64x64 pixels each
    for color, count in counted.items():
        wanted = Image.new("RGB", (1, 1), color).getpixel((0, 0))
        found = sum(n for n, pixel in sheet.getcolors(10_000) if pixel == wanted)
        assert found == count * 64 * 64, color
