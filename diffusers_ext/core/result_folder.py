"""Results that appear in a folder all at once, replace an earlier one as a whole, and never by chance."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers_ext.core.artifacts import full_disk_named, write_atomically

RESULT_LIST = ".result.json"
OVERWRITE_FLAG = "--overwrite_output_dir"
_STAGING = ".partial-output"


def check_no_result(
    folder: str | os.PathLike, names: Iterable[str] = (), *, flag: str = "output_dir", hint: str = ""
) -> None:
    """Raise `ValueError` where a folder holds a finished result: a second one must not replace it unasked."""
    folder = Path(folder)
    listed = _read_list(folder)
    finished = listed["files"] if listed.get("complete") else ()
    found = [name for name in finished if (folder / name).exists()]
    found = found or [name for name in names if (folder / name).is_file()]
    if found:
        raise ValueError(
            f"`{flag}` must hold no finished result, got {found[0]} in {folder}.{hint} Pass "
            f"`{OVERWRITE_FLAG}` to replace the result, or choose another folder."
        )


def check_no_file(path: str | os.PathLike, overwrite: bool, *, flag: str = "output_path") -> None:
    """Raise `ValueError` where a file that is to be written is there already."""
    if not overwrite and Path(path).exists():
        raise ValueError(
            f"`{flag}` must be a new file, got {path}, which is there. Pass `{OVERWRITE_FLAG}` to "
            "replace it, or choose another name."
        )


@contextmanager
def staged_output(
    output_dir: str | os.PathLike, last: Sequence[str] = (), beside: Sequence[str] = ()
) -> Iterator[Path]:
    """A hidden folder whose files move to `output_dir` when the block ends; after an exception nothing of it is left.

    The files of the result are listed in `.result.json`; those of an earlier list that the new result lacks are
    removed, so old and new are never mixed. What nobody listed stays.

    Args:
        last: names of files without which the results do not load. They are withdrawn before the others move and come
            last, so old and new are never taken for one result.
        beside: patterns of files that the run has written to `output_dir` itself.
    """
    output_dir = Path(output_dir)
    is_new = not output_dir.exists()
    staging = output_dir / _STAGING
    with full_disk_named(output_dir):
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        staging.mkdir(parents=True)
        try:
            yield staging
            _move_all(staging, output_dir, last, beside)
        finally:
            shutil.rmtree(staging)
            if is_new and not any(output_dir.iterdir()):
                output_dir.rmdir()


def remove_result(folder: str | os.PathLike, patterns: Sequence[str] = ()) -> None:
    """Remove a result's files, and folders that are empty then; what nobody listed stays."""
    folder = Path(folder)
    _remove_files(folder, [*_read_list(folder).get("files", ()), *_matching(folder, patterns)])
    (folder / RESULT_LIST).unlink(missing_ok=True)


def _move_all(staging: Path, output_dir: Path, last: Sequence[str], beside: Sequence[str]) -> None:
    paths = (path for path in staging.rglob("*") if path.is_file() or path.is_symlink())
    names = [path.relative_to(staging).as_posix() for path in paths]
    names = [*names, *_matching(output_dir, beside)]
    for name in last:
        (output_dir / name).unlink(missing_ok=True)
    _remove_files(output_dir, sorted(set(_read_list(output_dir).get("files", ())) - set(names)))
    _write_list(output_dir, names, complete=False)
    entries = os.listdir(staging)
    _move_contents(staging, output_dir, [name for name in entries if name not in last])
    _move_contents(staging, output_dir, [name for name in entries if name in last])
    _write_list(output_dir, names, complete=True)


def _move_contents(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in sorted(names):
        path, place = source / name, target / name
        if path.is_dir() and not path.is_symlink() and place.is_dir():
            _move_contents(path, place, os.listdir(path))
        else:
            os.replace(path, place)


def _read_list(folder: Path) -> dict[str, Any]:
    """`.result.json`, if it is one; a list that names files elsewhere is none."""
    try:
        listed = json.loads((folder / RESULT_LIST).read_text(encoding="utf-8"))
        files = listed["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    inside = isinstance(files, list) and all(map(_is_inside, files))
    return listed if inside else {}


def _is_inside(name: Any) -> bool:
    if not isinstance(name, str) or not name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _write_list(folder: Path, names: Sequence[str], *, complete: bool) -> None:
    content = json.dumps({"complete": complete, "files": sorted(set(names))}, indent=1)
    write_atomically(folder / RESULT_LIST, content + "\n")


def _matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    found = (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return [path.relative_to(folder).as_posix() for path in found]


def _remove_files(root: Path, names: Iterable[str]) -> None:
    """Remove files, and folders that are empty then."""
    for name in names:
        (root / name).unlink(missing_ok=True)
        folder = (root / name).parent
        while folder != root and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
