"""Writes a demo's report as one HTML file: pictures inside, no scripts, nothing fetched."""

from __future__ import annotations

import base64
import io
import os
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from examples.demo_report import Comparison, DemoReport, Gallery, Picture, Table

TEMPLATE = "report.html.jinja"
_FRAME_MILLISECONDS = 125
_LAST_FRAME_MILLISECONDS = 500  # a clip rests before it starts again
_RELOAD_SECONDS = 10


def write_page(report: DemoReport, path: str | os.PathLike) -> None:
    """Write the report as it is; whoever reads the file finds the old page or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(render_page(report))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def render_page(report: DemoReport) -> str:
    """The report as HTML."""
    return _template().render(
        report=report,
        reload_seconds=_RELOAD_SECONDS,
        written_at=time.strftime("%H:%M:%S"),
        describe=describe,
        still_of=still_of,
        longest=max([report.preparation, *(t for s in report.sections for t in s.seconds.values())]),
        clips_begin=next((s for s in report.sections if _holds_clips(s.blocks.values())), None),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        auto_reload=False,  # one run, one look, also if the files change meanwhile
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(seconds=seconds_text, slug=slug, data_uri=data_uri)
    environment.tests.update(gallery=lambda block: isinstance(block, Gallery))
    return environment.get_template(TEMPLATE)


def describe(comparison: Comparison, side: str) -> str:
    """Alternative text of one picture."""
    picture = comparison.pictures[side]
    kind = f"Clip of {len(picture.frames)} frames" if len(picture.frames) > 1 else "Picture"
    verdict = {None: "", True: "right: ", False: "wrong: "}[picture.right]
    read = f"; {verdict}{picture.reading}" if picture.reading else ""
    return f"{kind}, {side}, for “{comparison.prompt}”{read}"


def data_uri(frames: Sequence[Image.Image]) -> str:
    """A PNG, animated and endless where there are several frames, without loss."""
    buffer = io.BytesIO()
    first, *others = frames
    if others:
        times = [_FRAME_MILLISECONDS] * len(others) + [_LAST_FRAME_MILLISECONDS]
        first.save(buffer, "PNG", save_all=True, append_images=others, duration=times, loop=0)
    else:
        first.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def still_of(picture: Picture) -> Sequence[Image.Image]:
    """The middle frame, alone."""
    return [picture.frames[len(picture.frames) // 2]]


def seconds_text(seconds: float) -> str:
    """`4.2 s`, `65 s`, `5 min 39 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes >= 2 else f"{round(seconds)} s"


def slug(text: str) -> str:
    """A text as a name for links."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _holds_clips(blocks: Iterable[Gallery | Table]) -> bool:
    return any(
        len(picture.frames) > 1
        for block in blocks
        if isinstance(block, Gallery)
        for comparison in block.comparisons
        for picture in comparison.pictures.values()
    )
