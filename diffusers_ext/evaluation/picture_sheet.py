"""One picture that shows many: rows with a label, columns with a heading."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from diffusers_ext.core.pictures import rgb_picture


KEPT_PER_PROMPT = 2  # pictures, or pairs of them, of one prompt on the sheet of a report
_SMALLEST_CELL, _LARGEST_CELL = 96, 256
_LABEL_WIDTH, _GAP, _HEADING, _FONT_SIZE, _LINE = 260, 6, 28, 14, 18
_BACKGROUND, _INK, _FAINT, _BAND = (255, 255, 255), (25, 25, 25), (110, 110, 110), (228, 232, 238)


class SheetRow(NamedTuple):
    """One row of a sheet."""

    label: str
    note: str  # a second, fainter text under the label
    pictures: list[Image.Image]
    section: str = ""  # a band with this title is drawn where it changes


def picture_sheet(rows: Sequence[SheetRow], columns: Sequence[str], pairs: int = 2) -> Image.Image:
    """Draw an RGB sheet; small pictures are enlarged by whole factors, without smoothing.

    Args:
        rows: each at most as many pictures as there are columns.
        columns: their headings.
        pairs: columns that stand close together; a wider gap follows each such group.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one row of pictures, got none.")
    too_long = [row.label for row in rows if len(row.pictures) > len(columns)]
    if too_long:
        raise ValueError(
            f"`columns` must head every picture, got {len(columns)} for {too_long[0]!r}."
        )
    sizes = [_shown_size(picture) for row in rows for picture in row.pictures]
    cell = max(width for width, _ in sizes), max(height for _, height in sizes)
    font = ImageFont.load_default(_FONT_SIZE)
    lefts = [
        _LABEL_WIDTH + _GAP + index * (cell[0] + _GAP) + (index // pairs) * 2 * _GAP
        for index in range(len(columns))
    ]
    headings = [_wrapped(column, cell[0], font) for column in columns]
    top = _HEADING + (max(text.count("\n") for text in headings)) * _LINE
    bands = sum(row.section != before for row, before in _with_previous_section(rows))
    height = top + len(rows) * (cell[1] + _GAP) + bands * (_HEADING + _GAP) + _GAP
    sheet = Image.new("RGB", (lefts[-1] + cell[0] + _GAP, height), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for left, text in zip(lefts, headings, strict=True):
        middle = left + cell[0] / 2, top / 2
        pen.multiline_text(middle, text, fill=_INK, font=font, anchor="mm", align="center")
    for row, before in _with_previous_section(rows):
        if row.section != before:
            pen.rectangle((0, top, sheet.width, top + _HEADING), fill=_BAND)
            pen.text((_GAP, top + _HEADING / 2), row.section, fill=_INK, font=font, anchor="lm")
            top += _HEADING + _GAP
        _draw_label(pen, row, top, cell[1], font)
        for left, picture in zip(lefts, row.pictures, strict=False):
            shown = rgb_picture(picture).resize(_shown_size(picture), Image.Resampling.NEAREST)
            sheet.paste(shown, (left, top))
        top += cell[1] + _GAP
    return sheet


def sheet_of_sides(rows: Sequence[SheetRow], sides: Sequence[str]) -> Image.Image:
    """A sheet whose rows repeat the same sides, once for every seed."""
    columns = list(sides) * (max(len(row.pictures) for row in rows) // len(sides))
    return picture_sheet(rows, columns, pairs=len(sides))


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy to keep for a sheet."""
    kept = image.copy()
    kept.thumbnail((_LARGEST_CELL, _LARGEST_CELL))
    return kept


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Text in lines of at most `width` pixels, also within long names."""
    per_line = max(1, int(width / font.getlength("n")))
    return "\n".join(textwrap.wrap(text, per_line)) or text


def _with_previous_section(rows: Sequence[SheetRow]) -> list[tuple[SheetRow, str]]:
    sections = ["", *(row.section for row in rows)]
    return list(zip(rows, sections[:-1], strict=True))


def _shown_size(picture: Image.Image) -> tuple[int, int]:
    longer = max(picture.size)
    factor = -(-_SMALLEST_CELL // longer)
    if longer > _LARGEST_CELL:
        return tuple(max(1, side * _LARGEST_CELL // longer) for side in picture.size)
    return picture.width * factor, picture.height * factor


def _draw_label(
    pen: ImageDraw.ImageDraw, row: SheetRow, top: int, height: int, font: ImageFont.FreeTypeFont
) -> None:
    per_line = int(_LABEL_WIDTH / pen.textlength("n", font=font))
    lines = max(1, height // (_FONT_SIZE + 4) - bool(row.note))
    text = textwrap.wrap(
        row.label or "(empty prompt)", per_line, max_lines=lines, placeholder=" ..."
    )
    label = "\n".join(text)
    pen.multiline_text((_GAP, top), label, fill=_INK, font=font)
    if row.note:
        bottom = pen.multiline_textbbox((_GAP, top), label, font=font)[3]
        pen.text((_GAP, bottom + 4), row.note, fill=_FAINT, font=font)
