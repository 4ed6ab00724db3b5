"""Clips to look at: a sheet of their frames, and files that move."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from diffusers.utils import export_to_video
from PIL import Image

from diffusers_ext.evaluation.picture_sheet import SheetRow, picture_sheet


CLIP_FORMATS = ("gif", "mp4")
_VIDEO_PACKAGES = ("imageio", "imageio_ffmpeg")
_SMALLEST_SIDE = 96  # pixels; smaller clips are enlarged by whole factors
_FRAMES_SHOWN = 9


class KeptClip(NamedTuple):
    """The clips of one prompt and one seed, by the side that drew them."""

    group: str
    prompt: str
    seed: int
    clips: dict[str, np.ndarray]  # side -> (frames, height, width, 3) uint8
    notes: dict[str, str]  # side -> what a detector said


def clip_sheet(kept: Sequence[KeptClip], frames: int = _FRAMES_SHOWN) -> Image.Image:
    """A picture with one row per prompt and side: at most `frames`, evenly spaced, first and last among them."""
    lengths = {len(clip) for one in kept for clip in one.clips.values()}
    if len(lengths) != 1:
        raise ValueError(
            "`kept` must hold clips of one number of frames, got "
            f"{sorted(lengths) or 'none'}. Clips are not saved with a report."
        )
    length = lengths.pop()
    shown = np.linspace(0, length - 1, min(frames, length)).round().astype(int)
    rows = [
        SheetRow(
            f"{side}: {one.prompt}" if side == next(iter(one.clips)) else side,
            one.notes.get(side, ""),
            [Image.fromarray(clip[frame]) for frame in shown],
            one.group.replace("_", " "),
        )
        for one in kept
        for side, clip in one.clips.items()
    ]
    return picture_sheet(rows, [f"frame {frame}" for frame in shown], pairs=len(shown))


def check_clip_format(clip_format: str) -> None:
    """Raise `ValueError` for another format, `ImportError` for mp4 without imageio and imageio-ffmpeg."""
    if clip_format not in CLIP_FORMATS:
        raise ValueError(f"The format of clips must be one of {CLIP_FORMATS}, got {clip_format!r}.")
    missing = [name for name in _VIDEO_PACKAGES if importlib.util.find_spec(name) is None]
    if clip_format == "mp4" and missing:
        raise ImportError(
            f"mp4 must have {list(_VIDEO_PACKAGES)} to be written, got none of {missing}. Run `pip "
            "install imageio imageio-ffmpeg`, or write gif."
        )


def write_clip(clip: np.ndarray, path: str | os.PathLike, fps: int = 8) -> None:
    """Write a clip `(frames, height, width, 3)` uint8 as an endless gif or as mp4, by the ending of `path`.

    Small clips are enlarged; `fps` is in [1, 50], and gif keeps time in hundredths of a second.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    check_clip_format(kind)
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8 or not len(clip):
        raise ValueError(
            f"`clip` must be (frames, height, width, 3) of 8 bits, got {clip.shape} {clip.dtype}."
        )
    if not 1 <= fps <= 50:
        raise ValueError(f"`fps` must be in [1, 50], got {fps}.")
    frames = _enlarged(clip)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "mp4":
        export_to_video(frames, str(path), fps=fps)
        return
    time = round(100 / fps) * 10
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=time, loop=0)


def _enlarged(clip: np.ndarray) -> list[Image.Image]:
    factor = max(1, -(-_SMALLEST_SIDE // max(clip.shape[1:3])))
    size = clip.shape[2] * factor, clip.shape[1] * factor
    return [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in clip]
