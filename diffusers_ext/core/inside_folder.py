"""The files of a folder and nothing else, whatever names and links in it say."""

from __future__ import annotations

import os
from pathlib import Path


# Begin the name of a repository's folder in the cache of the Hub, whose files are links to `blobs`.
_CACHED = ("models--", "datasets--")


def path_inside(folder: str | os.PathLike, name: str | os.PathLike) -> Path:
    """The path of a file by its name in a folder, which must lie there and not only be linked.

    Whoever made the folder chooses names and links; what is uploaded or shown because of them must be
    theirs. Links within the folder are followed, as are those of the cache of the Hub to its own files.

    Args:
        folder: as its user named it.
        name: relative to it.

    Raises:
        ValueError: an absolute name, one that leads upwards, or a link out of the folder.
    """
    folder, name = Path(folder), Path(name)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(
            f"{folder} must name files below itself, got {str(name)!r}, which is elsewhere. Nothing "
            "outside of a folder is uploaded with it."
        )
    path = folder / name
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise ValueError(
            f"{path} must be a file below {folder}, got a link to {target}. Nothing outside of a "
            "folder is uploaded with it: put a copy of the file in its place, if it belongs there."
        )
    return path


def _roots(folder: Path) -> list[Path]:
    """The folder itself and, in the cache of the Hub, where its repository keeps the contents."""
    real = Path(os.path.realpath(folder))
    snapshots = [
        parent for parent in real.parents
        if parent.name == "snapshots" and parent.parent.name.startswith(_CACHED)
    ]  # fmt: skip
    return [real, *(parent.parent / "blobs" for parent in snapshots)]
