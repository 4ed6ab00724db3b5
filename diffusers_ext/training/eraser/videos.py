"""Read videos of a folder as frames of one size: gif, mp4 and the like, or folders of pictures."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path

import numpy as np
from diffusers.utils import load_video
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from diffusers_ext.core.pictures import (
    FoundFiles,
    is_hidden,
    read_picture,
    rgb_picture,
    why_no_picture,
)


logger = logging.getLogger(__name__)


ANIMATIONS = (".gif", ".webp", ".apng")
CODED = (".mp4", ".mov", ".avi", ".mkv", ".webm")


def list_videos(folder: Path) -> list[Path]:
    """Videos of a folder by name: its video files, and its folders that hold pictures.

    How many of how many entries are read, and which are not and why, goes into the log.

    Raises:
        ValueError: no such folder, or no video in it.
    """
    if not folder.is_dir():
        raise ValueError(f"`video_dir` must be a folder of videos, got {folder}: no such folder.")
    entries = {path: _why_no_video(path) for path in sorted(folder.iterdir())}
    passed_over = {path.name: reason for path, reason in entries.items() if reason is not None}
    found = FoundFiles(
        folder,
        tuple(path for path, reason in entries.items() if reason is None),
        passed_over,
        "videos",
    )
    if not found.paths:
        raise ValueError(
            f"`video_dir` must hold videos ({', '.join(ANIMATIONS + CODED)}, or folders of "
            f"pictures), got none. {found.summary()}"
        )
    logger.info(found.summary())
    return list(found.paths)


def _why_no_video(path: Path) -> str | None:
    if is_hidden(path):
        return "hidden or of the system"
    if path.is_dir():
        return None if _pictures(path) else "folders without pictures"
    if path.suffix.lower() not in ANIMATIONS + CODED:
        return "of another format"
    return None if path.is_file() else "links to nothing or no plain files"


def read_video(path: Path, num_frames: int, height: int, width: int) -> np.ndarray:
    """The first frames of a video, scaled to cover the size and cropped around the centre.

    Returns:
        `(num_frames, height, width, 3)` uint8.

    Raises:
        ValueError: a video that cannot be read or has fewer frames.
        ImportError: a coded video, and no package that reads it.
    """
    try:
        frames = [
            np.asarray(ImageOps.fit(rgb_picture(frame), (width, height), Image.BICUBIC))
            for frame in islice(_frames(path), num_frames)
        ]
    except (UnidentifiedImageError, OSError, EOFError) as error:
        raise ValueError(f"{path} must be a video that can be read, got: {error}.") from error
    if len(frames) < num_frames:
        raise ValueError(
            f"{path} must have at least {num_frames} frames, got {len(frames)}. Take it out, or "
            "train on fewer frames."
        )
    return np.stack(frames)


def _frames(path: Path) -> Iterator[Image.Image]:
    if path.is_dir():
        for picture in _pictures(path):
            yield read_picture(picture)
    elif path.suffix.lower() in ANIMATIONS:
        with Image.open(path) as animation:
            yield from _animation_frames(animation)
    else:
        missing = [n for n in ("imageio", "imageio_ffmpeg") if not importlib.util.find_spec(n)]
        if missing:
            raise ImportError(
                f"{path.name} needs the packages imageio and imageio-ffmpeg, got no "
                f"{' and no '.join(missing)}. Install them, or use gifs or folders of pictures."
            )
        yield from load_video(str(path))


def _animation_frames(animation: Image.Image) -> Iterator[Image.Image]:
    """Frames at the rate of the shortest: writers join equal frames to one that is shown longer."""
    times = [frame.info.get("duration", 0) for frame in ImageSequence.Iterator(animation)]
    shortest = min((time for time in times if time > 0), default=0)
    for time, frame in zip(times, ImageSequence.Iterator(animation), strict=True):
        yield from repeat(frame, max(1, round(time / shortest)) if shortest else 1)


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if why_no_picture(path) is None)
