from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.evaluation import sheets as module
from diffusers_ext.evaluation.sheets import KeptClip, check_clip_format, clip_sheet, write_clip


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
