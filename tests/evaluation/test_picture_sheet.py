from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.evaluation.sheets import SheetRow, picture_sheet


RED, BLUE = (200, 0, 0), (0, 0, 200)


def count(sheet: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == color).all(axis=-1).sum())


def test_small_pictures_are_enlarged_by_a_whole_factor():
    row = SheetRow("a red one", "", [Image.new("RGB", (32, 32), RED)])
    sheet = picture_sheet([row], ["base"])
    assert count(sheet, RED) == 96 * 96
    assert sheet.mode == "RGB"


def test_large_pictures_keep_their_aspect():
    row = SheetRow("a", "", [Image.new("RGB", (1024, 512), RED)])
    assert count(picture_sheet([row], ["base"]), RED) == 256 * 128


def test_pictures_stand_in_the_order_of_their_columns():
    row = SheetRow("a", "", [Image.new("RGB", (32, 32), color) for color in (RED, BLUE)])
    pixels = np.asarray(picture_sheet([row], ["base", "tuned"]))
    lefts = [(pixels == color).all(axis=-1).any(axis=0).argmax() for color in (RED, BLUE)]
    assert lefts[0] + 96 < lefts[1]


def test_a_section_starts_with_a_band():
    def rows(*sections: str) -> list[SheetRow]:
        return [SheetRow("a", "", [Image.new("L", (32, 32))], section) for section in sections]

    plain, one, two = (
        picture_sheet(rows(*sections), ["base"]).height
        for sections in (("", ""), ("preserved", "preserved"), ("preserved", "held out"))
    )
    assert plain < one < two
    assert two - one == one - plain


def test_labels_and_notes_are_drawn_and_long_labels_stay_left_of_the_pictures():
    picture = Image.new("RGB", (64, 64), RED)
    blank = picture_sheet([SheetRow(" ", "", [picture])], ["base"])
    labelled = picture_sheet([SheetRow("a very long prompt " * 30, "note", [picture])], ["base"])
    assert labelled.size == blank.size
    different = (np.asarray(blank) != np.asarray(labelled)).any(axis=-1)
    assert different.any()
    assert different.any(axis=0).nonzero()[0].max() < 266


def test_an_empty_sheet_and_a_row_without_headings_are_refused():
    with pytest.raises(ValueError, match="`rows` must hold at least one row"):
        picture_sheet([], ["base"])
    row = SheetRow("a", "", [Image.new("RGB", (8, 8))] * 2)
    with pytest.raises(ValueError, match="`columns` must head every picture, got 1 for 'a'"):
        picture_sheet([row], ["base"])


def test_long_headings_get_more_lines():
    picture = Image.new("RGB", (32, 32))
    rows = [SheetRow("a prompt", "", [picture, picture])]
    short = picture_sheet(rows, ["base", "tuned"])
    long = picture_sheet(rows, ["base", "NoiseSequenceTransformer of five steps"])
    assert long.height > short.height
    assert long.width == short.width
