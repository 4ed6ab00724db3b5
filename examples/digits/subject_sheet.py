"""One picture of what several models draw: a block per model, a row per group of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

_COLUMNS = 16
_SIZE, _MARGIN, _LABEL, _GAP = 64, 190, 26, 4


def subject_sheet(
    images: Mapping[str, Mapping[str, Sequence[Image.Image]]], rows: Mapping[str, tuple[str, int]]
) -> Image.Image:
    """Draw the sheet; the same place in every block has the same prompt and seed.

    Args:
        images: `{model: {group: pictures}}`.
        rows: `{group: (title, every so many pictures are shown)}`.
    """
    font = ImageFont.load_default(15)
    block = _LABEL + len(rows) * (_SIZE + _GAP) + 10
    sheet = Image.new("RGB", (_MARGIN + _COLUMNS * _SIZE, block * len(images) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (name, groups) in enumerate(images.items()):
        top = number * block + 6
        pen.text((8, top), name, fill="black", font=font)
        for line, (group, (title, stride)) in enumerate(rows.items()):
            y = top + _LABEL + line * (_SIZE + _GAP)
            broken = title.replace("the ", "the\n", 1)
            pen.multiline_text((8, y + 12), broken, fill="#555", font=font)
            for index, image in enumerate(groups[group][::stride][:_COLUMNS]):
                enlarged = image.resize((_SIZE, _SIZE), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (_MARGIN + index * _SIZE, y))
    return sheet
