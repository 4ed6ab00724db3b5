"""Results that appear in the output folder all at once, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


_STAGING = ".partial-output"


@contextmanager
def staged_output(output_dir: str | os.PathLike, last: Sequence[str] = ()) -> Iterator[Path]:
    """A hidden folder whose files move to `output_dir` when the block ends without an exception.

    After an exception nothing of it is left, nor is `output_dir` where it did not exist before.

    Args:
        output_dir: the folder of the results; older files of the same names are replaced, and a
            folder that is not there yet appears with all that is in it.
        last: names of files without which the results do not load. They are withdrawn before
            the others move and come last, so old and new are never taken for one result.

    Yields:
        The hidden folder.
    """
    output_dir = Path(output_dir)
    is_new = not output_dir.exists()
    staging = output_dir / _STAGING
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    staging.mkdir(parents=True)
    try:
        yield staging
        for name in last:
            (output_dir / name).unlink(missing_ok=True)
        names = os.listdir(staging)
        _move_contents(staging, output_dir, [name for name in names if name not in last])
        _move_contents(staging, output_dir, [name for name in names if name in last])
    finally:
        shutil.rmtree(staging)
        if is_new and not any(output_dir.iterdir()):
            output_dir.rmdir()


def _move_contents(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in sorted(names):
        path, place = source / name, target / name
        if path.is_dir() and not path.is_symlink() and place.is_dir():
            _move_contents(path, place, os.listdir(path))
        else:
            os.replace(path, place)
