from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.evaluation import report_files as module
from diffusers_ext.evaluation.report_files import (
    KeptClip,
    SheetRow,
    check_clip_format,
    clip_sheet,
    picture_sheet,
    write_clip,
)

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


COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]


def clip(count: int = 5, height: int = 4, width: int = 8) -> np.ndarray:
    colors = np.array([COLORS[index % 5] for index in range(count)], dtype=np.uint8)
    return np.tile(colors[:, None, None], (1, height, width, 1))


def kept(**sides: np.ndarray) -> KeptClip:
    return KeptClip("target", "a red seven", 3, sides, dict.fromkeys(sides, "digit seen"))


def test_rows_of_frames_by_side():
    sheet = np.asarray(clip_sheet([kept(base=clip(), erased=clip()[::-1])], frames=3))
    heights = np.flatnonzero((sheet == [255, 0, 0]).all(-1).any(1))
    rows = np.split(heights, np.flatnonzero(np.diff(heights) > 1) + 1)
    assert len(rows) == 2
    places = []
    for row in rows:
        line = sheet[row[len(row) // 2]]
        shown = [np.flatnonzero((line == color).all(-1)) for color in COLORS]
        assert [len(x) for x in shown] == [96, 0, 96, 0, 96]  # first, middle and last frame
        places.append([x.mean() for x in shown if len(x)])
    assert places[0] == places[1][::-1]


def test_a_sheet_needs_clips_of_one_length():
    with pytest.raises(ValueError, match="of one number of frames, got none"):
        clip_sheet([])
    with pytest.raises(ValueError, match=r"of one number of frames, got \[3, 5\]"):
        clip_sheet([kept(base=clip(), erased=clip(3))])


def test_a_gif_shows_the_frames_in_time(tmp_path):
    write_clip(clip(), tmp_path / "new" / "a.gif", fps=5)
    with Image.open(tmp_path / "new" / "a.gif") as gif:
        assert gif.n_frames == 5
        assert gif.size == (96, 48)
        assert gif.info["duration"] == 200
        assert gif.info["loop"] == 0
        for index, color in enumerate(COLORS):
            gif.seek(index)
            assert gif.convert("RGB").getpixel((50, 20)) == color


def test_large_clips_keep_their_size(tmp_path):
    write_clip(clip(2, 100, 120), tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (120, 100)


def test_mp4_is_left_to_diffusers(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(module, "export_to_video", lambda *a, **k: written.append((a, k)))
    write_clip(clip(), tmp_path / "a.mp4", fps=7)
    ((frames, path), settings) = written[0]
    assert len(frames) == 5
    assert frames[2].getpixel((0, 0)) == COLORS[2]
    assert path == str(tmp_path / "a.mp4")
    assert settings == {"fps": 7}


def test_mp4_without_its_packages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "imageio" or None)
    with pytest.raises(ImportError, match=r"got none of \['imageio_ffmpeg'\]. Run `pip install"):
        write_clip(clip(), tmp_path / "new" / "a.mp4")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("array", "name", "fps", "message"),
    [
        (clip(), "a.png", 8, "must be one of .*gif.*, got 'png'"),
        (clip()[0], "a.gif", 8, r"`clip` must be \(frames, height, width, 3\)"),
        (clip().astype(float), "a.gif", 8, "of 8 bits, got .* float64"),
        (clip(0), "a.gif", 8, "`clip` must be"),
        (clip(), "a.gif", 0, r"`fps` must be in \[1, 50\], got 0"),
    ],
)
def test_what_is_no_clip_is_refused(tmp_path, array, name, fps, message):
    with pytest.raises(ValueError, match=message):
        write_clip(array, tmp_path / name, fps)


def test_formats():
    check_clip_format("gif")
    with pytest.raises(ValueError, match="got 'avi'"):
        check_clip_format("avi")
