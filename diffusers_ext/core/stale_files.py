"""Files of an earlier upload that would be loaded together with, or in place of, the new ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath


# As diffusers and transformers name weights: whole, in shards, and the shards' index.
_WEIGHTS = re.compile(
    r"(?P<stem>[^.]+?)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.(?P<format>safetensors|bin)"
)
_INDEX = re.compile(
    r"(?P<stem>[^.]+)\.(?P<format>safetensors|bin)\.index(?:\.(?P<variant>\w+))?\.json"
)


def stale_files(
    present: Iterable[str], new: Collection[str], delete_patterns: Sequence[str] = ()
) -> list[str]:
    """Those files of a repository that a new upload takes the place of without overwriting them.

    These are shards, and indices of shards, of weights that come anew in other parts; a loader
    prefers an old index to the new file. Another variant or format of the weights stays.

    Args:
        present: names in the repository.
        new: names of the upload.
        delete_patterns: further names that belong to the artifact, as for `fnmatch`.
    """
    weights = {_weights(name) for name in new} - {None}
    return [
        name
        for name in present
        if name not in new
        and (
            _weights(name) in weights
            or any(fnmatchcase(name, pattern) for pattern in delete_patterns)
        )
    ]


def _weights(name: str) -> tuple[str, ...] | None:
    """What whole file, shards and index of the same weights have in common."""
    path = PurePosixPath(name)
    found = _WEIGHTS.fullmatch(path.name) or _INDEX.fullmatch(path.name)
    if found is None:
        return None
    return (str(path.parent), found["stem"], found["variant"] or "", found["format"])
