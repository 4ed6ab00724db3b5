"""The files of an evaluation's report: JSON that is read back, CSV, Markdown tables and a sheet of pictures."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from diffusers.utils import export_to_video
from PIL import Image, ImageDraw, ImageFont

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.pictures import rgb_picture
from diffusers_ext.core.text_files import read_json
from diffusers_ext.evaluation.rendering import spread_frames
from diffusers_ext.hub import Measured

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
    """Draw an RGB sheet under the headings `columns`; small pictures are enlarged by whole factors, not smoothed.

    So many columns as `pairs` says stand close together; a wider gap follows each such group.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one row of pictures, got none.")
    too_long = [row.label for row in rows if len(row.pictures) > len(columns)]
    if too_long:
        raise ValueError(f"`columns` must head every picture, got {len(columns)} for {too_long[0]!r}.")
    sizes = [_shown_size(picture) for row in rows for picture in row.pictures]
    cell = max(width for width, _ in sizes), max(height for _, height in sizes)
    font = ImageFont.load_default(_FONT_SIZE)
    lefts = [
        _LABEL_WIDTH + _GAP + index * (cell[0] + _GAP) + (index // pairs) * 2 * _GAP for index in range(len(columns))
    ]
    headings = [_wrapped(column, cell[0], font) for column in columns]
    top = _HEADING + (max(text.count("\n") for text in headings)) * _LINE
    befores = ["", *(row.section for row in rows)]  # the section above each row
    bands = sum(row.section != before for row, before in zip(rows, befores, strict=False))
    height = top + len(rows) * (cell[1] + _GAP) + bands * (_HEADING + _GAP) + _GAP
    sheet = Image.new("RGB", (lefts[-1] + cell[0] + _GAP, height), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for left, text in zip(lefts, headings, strict=True):
        middle = left + cell[0] / 2, top / 2
        pen.multiline_text(middle, text, fill=_INK, font=font, anchor="mm", align="center")
    for row, before in zip(rows, befores, strict=False):
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


def _shown_size(picture: Image.Image) -> tuple[int, int]:
    longer = max(picture.size)
    factor = -(-_SMALLEST_CELL // longer)
    if longer > _LARGEST_CELL:
        return tuple(max(1, side * _LARGEST_CELL // longer) for side in picture.size)
    return picture.width * factor, picture.height * factor


def _draw_label(pen: ImageDraw.ImageDraw, row: SheetRow, top: int, height: int, font: ImageFont.FreeTypeFont) -> None:
    per_line = int(_LABEL_WIDTH / pen.textlength("n", font=font))
    lines = max(1, height // (_FONT_SIZE + 4) - bool(row.note))
    text = textwrap.wrap(row.label or "(empty prompt)", per_line, max_lines=lines, placeholder=" ...")
    label = "\n".join(text)
    pen.multiline_text((_GAP, top), label, fill=_INK, font=font)
    if row.note:
        bottom = pen.multiline_textbbox((_GAP, top), label, font=font)[3]
        pen.text((_GAP, bottom + 4), row.note, fill=_FAINT, font=font)


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
    shown = spread_frames(lengths.pop(), frames)
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
    """Write a clip `(frames, height, width, 3)` uint8 as an endless gif, as mp4, or one frame as png, by `path`.

    Small clips are enlarged; `fps` is in [1, 50], and gif keeps time in hundredths of a second.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    if kind != "png" or len(clip) != 1:
        check_clip_format(kind)
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8 or not len(clip):
        raise ValueError(f"`clip` must be (frames, height, width, 3) of 8 bits, got {clip.shape} {clip.dtype}.")
    if not 1 <= fps <= 50:
        raise ValueError(f"`fps` must be in [1, 50], got {fps}.")
    factor = max(1, -(-_SMALLEST_SIDE // max(clip.shape[1:3])))
    size = clip.shape[2] * factor, clip.shape[1] * factor
    frames = [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in clip]
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "png":
        frames[0].save(path)
        return
    if kind == "mp4":
        export_to_video(frames, str(path), fps=fps)
        return
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(100 / fps) * 10, loop=0)


ReportType = TypeVar("ReportType", bound="SavedReport")


class SavedReport:
    """A report whose figures are written to JSON and read back; pictures are not.

    A subclass is a dataclass with the field `rows` that names the saved fields in `saved`; the others have defaults.
    `pictures` names the field that its sheet shows, `csv_name` the file of its rows.
    """

    saved: ClassVar[tuple[str, ...]]
    pictures: ClassVar[str] = "kept"
    csv_name: ClassVar[str | None] = None

    def measured(self) -> Iterator[Measured]:
        """What a model card shows."""
        raise TypeError(f"{type(self).__name__} must define `measured`.")

    def to_table(self) -> str:
        """The figures as Markdown tables."""
        raise TypeError(f"{type(self).__name__} must define `to_table`.")

    def _sheet(self) -> Image.Image:
        raise TypeError(f"{type(self).__name__} must define `_sheet`.")

    def to_json(self, path: str | os.PathLike) -> None:
        """Write everything but the pictures."""
        content = {name: getattr(self, name) for name in self.saved}
        write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls: type[ReportType], path: str | os.PathLike) -> ReportType:
        """Read what `to_json` wrote; raises `ValueError` for a file of something else."""
        content = read_json(path)
        if set(content) != set(cls.saved):
            raise ValueError(f"{path} must hold {list(cls.saved)}, got something else.")
        return cls(**content)

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write one line per row."""
        write_rows(path, self.rows)

    def picture_sheet(self, path: str | os.PathLike) -> None:
        """Write a picture with the kept ones side by side; raises `ValueError` where there are none."""
        sheet = self._sheet()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)

    def _kept_pictures(self) -> list[Any]:
        kept = getattr(self, self.pictures)
        if not kept:
            raise ValueError(
                f"`{self.pictures}` must hold pictures to draw a sheet, got none. They are not saved "
                "with the report, and `sheet_prompts=0` keeps none."
            )
        return kept

    def save(self, folder: str | os.PathLike) -> None:
        """Write `report.json`, `table.md`, the rows as CSV, and of pictures that were kept `sheet.png`."""
        self.to_json(Path(folder, "report.json"))
        write_text(Path(folder, "table.md"), self.to_table())
        if self.csv_name is not None:
            self.to_csv(Path(folder, self.csv_name))
        if getattr(self, self.pictures):
            self.picture_sheet(Path(folder, "sheet.png"))


def number_cell(value: float | None, interval: Sequence[float] | None = None, form: str = ".4g") -> str:
    """A number, with its interval in brackets; `-` for `None`."""
    if value is None:
        return "-"
    text = f"{value:{form}}"
    return text if interval is None else f"{text} [{interval[0]:{form}}, {interval[1]:{form}}]"


def measured_cell(found: Mapping[str, Any], name: str, form: str = ".4g") -> str:
    """A figure of a summary that holds its interval as `name_interval`; `-` where it does not hold it."""
    return number_cell(found.get(name), found.get(f"{name}_interval"), form)


def interval_words(interval: Sequence[float]) -> str:
    """An interval as the notes of a model card tell it."""
    return f"95 % interval {interval[0]:.3g} to {interval[1]:.3g}"


def spoken(name: str) -> str:
    """A name of code as words."""
    return name.replace("_", " ")


def write_rows(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys, at least one, as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: str | os.PathLike, content: str) -> None:
    """Write a file whole or not at all; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
