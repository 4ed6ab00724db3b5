"""Which files of a folder go to the Hub, and which of the Hub's go, without a path of this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers_ext.hub.licence import CACHED_FOLDERS, public_name

CONFIG_DIGEST = "config_sha256"
# Files in which the libraries and the training scripts note where something came from.
_ENDINGS = ("config.json", "model_index.json", "report.json")
# As diffusers and transformers name weights: whole, in shards, and the shards' index.
_WEIGHTS = re.compile(r"(?P<stem>[^.]+?)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.(?P<format>safetensors|bin)")
_INDEX = re.compile(r"(?P<stem>[^.]+)\.(?P<format>safetensors|bin)\.index(?:\.(?P<variant>\w+))?\.json")


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config's contents, however it is indented or ordered, without the digest itself."""
    kept = {key: value for key, value in config.items() if key != CONFIG_DIGEST}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def path_inside(folder: str | os.PathLike, name: str | os.PathLike) -> Path:
    """The path of a file by its name in a folder, which must lie there and not only be linked.

    Whoever made the folder chooses names and links; what is uploaded or shown because of them must be theirs. Links
    within the folder are followed, as are those of the cache of the Hub to its own files.

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
        if parent.name == "snapshots" and parent.parent.name.startswith(CACHED_FOLDERS)
    ]  # fmt: skip
    return [real, *(parent.parent / "blobs" for parent in snapshots)]


def public_content(path: Path) -> bytes | None:
    """A file as others may read it, where that differs from the file; `None` where it does not.

    Strings that are absolute paths of this machine become what `public_name` makes of them; of a component of a
    pipeline, the name of the pipeline. All other characters stay, but for the checksum of its own contents that a
    config may hold: it fits again. Only configs and reports in JSON are looked into.
    """
    if not path.name.endswith(_ENDINGS):
        return None
    original = path.read_bytes()
    try:
        text = original.decode()
        content = json.loads(text)
        found = sorted({value for value in _strings(content) if _is_local_path(value)})
    except (ValueError, RecursionError):  # neither ours nor of a library
        return None
    if not found:
        return None
    for value in found:
        of_pipeline = Path(value).with_name("model_index.json").is_file()
        public = public_name(Path(value).parent if of_pipeline else value)
        for ascii_only in (True, False):
            written, shown = (json.dumps(x, ensure_ascii=ascii_only) for x in (value, public))
            text = text.replace(written, shown)
    digest = content.get(CONFIG_DIGEST) if isinstance(content, dict) else None
    if digest is not None and digest == config_digest(content):
        text = text.replace(f'"{digest}"', f'"{config_digest(json.loads(text))}"')
    return text.encode()


def _is_local_path(value: str) -> bool:
    """Whether a string is an absolute path; a prompt such as "/imagine a fox" is none."""
    path = Path(value)
    # The first folder must exist; the rest may be gone by now.
    return path.is_absolute() and len(path.parts) > 2 and os.path.isdir(Path(*path.parts[:2]))


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, (dict, list)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _strings(item)


def stale_files(present: Iterable[str], new: Collection[str], delete_patterns: Sequence[str] = ()) -> list[str]:
    """Those files of a repository that a new upload takes the place of without overwriting them.

    These are shards, and indices of shards, of weights that come anew in other parts; a loader prefers an old index to
    the new file. Another variant or format of the weights stays.

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
        and (_weights(name) in weights or any(fnmatchcase(name, pattern) for pattern in delete_patterns))
    ]


def _weights(name: str) -> tuple[str, ...] | None:
    """What whole file, shards and index of the same weights have in common."""
    path = PurePosixPath(name)
    found = _WEIGHTS.fullmatch(path.name) or _INDEX.fullmatch(path.name)
    if found is None:
        return None
    return (str(path.parent), found["stem"], found["variant"] or "", found["format"])
