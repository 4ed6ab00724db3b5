"""One run a folder: a second process is told which one is there. A killed run leaves no lock behind."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


LOCK_NAME = ".run.lock"


@contextmanager
def folder_lock(folder: str | os.PathLike, flag: str = "output_dir") -> Iterator[None]:
    """Hold a folder for this process while the block runs.

    The lock is the operating system's, on the file `.run.lock` in the folder: it ends with the
    process, however that ends. A file that is left by a killed one is taken over. The folder is
    made when absent, and removed with the parents made for it when the block leaves it empty.

    Args:
        flag: what the folder is called on the command line.
    """
    folder = Path(folder)
    made = _make(folder, flag)
    path = folder / LOCK_NAME
    owner = _owner(path)  # as it was before this process asks for it
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"`{flag}` must be used by one run at a time, got {folder}, which {owner} is writing to. "
                "Wait for it or stop it, or choose another folder."
            ) from error
        try:
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file
                path.unlink()
            lock.release()
    finally:
        for parent in made:
            with suppress(OSError):  # not empty
                parent.rmdir()


def _make(folder: Path, flag: str) -> list[Path]:
    """Make a folder; returns it and the parents that were made, the innermost first."""
    made, parent = [], folder
    while not parent.exists() and not parent.is_symlink():
        made.append(parent)
        parent = parent.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"`{flag}` must be a folder, got {folder}.") from error
    return made


def _owner(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {int(owner['pid'])} on {str(owner['host'])[:80]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
