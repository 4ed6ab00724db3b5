from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.training.eraser.data import list_videos, read_video


def moving_square(num_frames=5, height=24, width=32):
    frames = np.zeros((num_frames, height, width, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        frame[8:16, 4 * index : 4 * index + 8] = (255, 0, 0)
    return frames


def write_gif(path, frames):
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=125)


def write_pictures(folder, frames):
    folder.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{index:03d}.png")


def test_videos_are_files_and_folders_of_pictures(tmp_path):
    write_gif(tmp_path / "b.GIF", moving_square())
    write_pictures(tmp_path / "a", moving_square())
    (tmp_path / "c.mp4").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / "empty").mkdir()
    assert [path.name for path in list_videos(tmp_path)] == ["a", "b.GIF", "c.mp4"]


@pytest.mark.parametrize("kind", ["gif", "pictures"])
def test_the_first_frames_are_read_in_order(tmp_path, kind):
    frames = moving_square()
    if kind == "gif":
        write_gif(tmp_path / "a.gif", frames)
    else:
        write_pictures(tmp_path / "a", frames)
    found = read_video(list_videos(tmp_path)[0], 3, 24, 32)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, frames[:3])


def test_frames_that_a_gif_has_joined_are_counted(tmp_path):
    frames = moving_square(5)
    frames = frames[[0, 1, 1, 1, 2, 3, 3]]
    write_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 4
    np.testing.assert_array_equal(read_video(tmp_path / "a.gif", 7, 24, 32), frames)


def test_videos_are_scaled_to_cover_the_size_and_cropped(tmp_path):
    frames = np.zeros((1, 20, 60, 3), dtype=np.uint8)
    frames[:, :, 20:40] = 255  # the middle third
    write_pictures(tmp_path / "a", frames)
    found = read_video(tmp_path / "a", 1, 10, 10)
    assert found.shape == (1, 10, 10, 3)
    assert found.min() > 200


def test_too_few_frames_are_refused(tmp_path):
    write_gif(tmp_path / "a.gif", moving_square(3))
    with pytest.raises(ValueError, match=r"a.gif must have at least 9 frames, got 3"):
        read_video(tmp_path / "a.gif", 9, 24, 32)


def test_folders_without_videos_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`video_dir` must be a folder of videos, got .*nothing"):
        list_videos(tmp_path / "nothing")
    with pytest.raises(ValueError, match="`video_dir` must hold videos"):
        list_videos(tmp_path)


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"GIF89a but no more")
    with pytest.raises(ValueError, match="a.gif must be a video that can be read"):
        read_video(tmp_path / "a.gif", 1, 8, 8)


def test_coded_videos_ask_for_the_package_that_reads_them(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="got no imageio and no imageio_ffmpeg"):
        read_video(tmp_path / "a.mp4", 1, 8, 8)


def test_coded_videos_are_read(tmp_path):
    imageio = pytest.importorskip("imageio")
    pytest.importorskip("imageio_ffmpeg")
    frames = np.full((9, 32, 32, 3), 128, dtype=np.uint8)
    imageio.mimwrite(tmp_path / "a.mp4", frames, fps=8)
    found = read_video(tmp_path / "a.mp4", 9, 16, 16)
    assert abs(found.astype(int) - 128).max() < 8


def test_cut_outs_and_hidden_files(tmp_path, caplog):
    cut_out = np.zeros((8, 8, 4), dtype=np.uint8)
    cut_out[..., 0] = 200  # hidden under alpha 0
    write_pictures(tmp_path / "a", [cut_out])
    (tmp_path / "a" / "._000.png").write_bytes(b"\0")
    for name in ("._b.mp4", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0")
    (tmp_path / "empty").mkdir()
    caplog.set_level("INFO")
    assert list_videos(tmp_path) == [tmp_path / "a"]
    assert f"Reading 1 videos of 5 entries of {tmp_path}" in caplog.text
    assert "2 hidden or of the system (.DS_Store, ._b.mp4)" in caplog.text
    assert read_video(tmp_path / "a", 1, 8, 8).min() == 255
