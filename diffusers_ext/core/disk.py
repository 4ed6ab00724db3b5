"""A full disk as one error that names the place, and a folder that one run at a time writes to."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError


# A quota is a disk of one's own.
FULL = (errno.ENOSPC, errno.EDQUOT)
# Of safetensors, and of torch, which does not tell why a file could not be written.
_WORDS = ("No space left", "os error 28", "os error 122", "PytorchStreamWriter failed writing")
LOCK_NAME = ".run.lock"


@contextmanager
def full_disk_named(path: str | os.PathLike) -> Iterator[None]:
    """Turn what libraries raise on a full disk within the block into one `OSError` that names the place."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_full_disk(error):
            raise
        where = getattr(error, "filename", None) or path
        message = (
            f"No space is left for {Path(where)}: free some on this disk, or write to another one; what "
            "was complete before is intact"
        )
        raise OSError(errno.ENOSPC, message, str(where)) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or the one behind it, says that a disk or a quota is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return True
        if not isinstance(seen, OSError) and any(word in str(seen) for word in _WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


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
