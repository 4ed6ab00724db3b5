"""A full disk, however the library that met it says so, as one error that names the place."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


# A quota is a disk of one's own.
FULL = (errno.ENOSPC, errno.EDQUOT)
# Of safetensors, and of torch, which does not tell why a file could not be written.
_WORDS = ("No space left", "os error 28", "os error 122", "PytorchStreamWriter failed writing")


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
