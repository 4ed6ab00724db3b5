"""What the local Hub keeps: repositories with immutable commits, branches, tags, pull requests."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from tests.hub_metadata import card_header, metadata_errors

# What a new repository on the Hub lists in its `.gitattributes`, and pictures and sounds.
_LFS_SUFFIXES = frozenset(
    ".7z .arrow .bin .bz2 .ckpt .gif .gz .h5 .jpeg .jpg .joblib .model .mp3 .mp4 .msgpack .npy .npz "
    ".onnx .parquet .pb .pickle .pkl .png .pt .pth .rar .safetensors .tar .tflite .tgz .wav .webm "
    ".webp .xz .zip .zst".split()
)
_LARGEST_REGULAR = 10 * 2**20


class HubError(Exception):
    """An answer that is no success; `code` becomes the header `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **headers}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class StoredFile:
    """The bytes of one file, in git or beside it."""

    content: bytes = field(repr=False)  # pytest shows what is at hand in a failing test
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        """Of the blob in git, which is a pointer for what lies beside it."""
        blob = self._pointer() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def _pointer(self) -> bytes:
        lines = "version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}"
        return "\n".join([*lines, f"size {len(self.content)}", ""]).encode()

    def entry(self, path: str) -> dict[str, Any]:
        """The line of a tree."""
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid}
        if self.lfs:
            size, pointer = len(self.content), len(self._pointer())
            entry["lfs"] = {"oid": self.sha256, "size": size, "pointerSize": pointer}
        return entry

    def sibling(self, path: str, blobs: bool) -> dict[str, Any]:
        """The line of a repository's information."""
        if not blobs:
            return {"rfilename": path}
        entry = self.entry(path)
        sibling = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
        if self.lfs:
            lfs = entry["lfs"]
            sibling["lfs"] = {"sha256": lfs.pop("oid"), **lfs}
        return sibling


@dataclass(frozen=True)
class Commit:
    """One state of a repository; never changes."""

    sha: str
    parent: Commit | None = field(repr=False)
    title: str
    files: Mapping[str, StoredFile] = field(repr=False)
    date: str

    def history(self) -> list[Commit]:
        """This one first."""
        return [self, *(self.parent.history() if self.parent else [])]

    def header(self) -> dict[str, Any]:
        """The YAML of the README; empty without one."""
        readme = self.files.get("README.md")
        return card_header(readme.content.decode()) if readme else {}

    def entries(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below a folder; empty when there is no such folder."""
        files, folders = [], set()
        for path, stored in self.files.items():
            parents = [str(p) for p in PurePosixPath(path).parents][:-1]
            if folder and folder not in parents:
                continue
            inner = parents[: parents.index(folder)] if folder else parents
            folders.update(inner if recursive else inner[-1:])
            if recursive or not inner:
                files.append(stored.entry(path))
        listed = [{"type": "directory", "path": path, "oid": _sha1(path)} for path in folders]
        return sorted(listed + files, key=lambda entry: entry["path"])


@dataclass
class Repository:
    """A repository; `refs` holds `refs/heads/*`, `refs/tags/*` and `refs/pr/*`."""

    repo_id: str
    kind: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict, repr=False)
    refs: dict[str, Commit] = field(default_factory=dict, repr=False)
    objects: dict[str, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        lines = [f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in sorted(_LFS_SUFFIXES)]
        attributes = StoredFile("".join(lines).encode(), lfs=False)
        first = self._add(None, "initial commit", {".gitattributes": attributes})
        self.refs["refs/heads/main"] = first

    def _add(self, parent: Commit | None, title: str, files: dict[str, StoredFile]) -> Commit:
        names = [f"{path} {stored.git_oid}" for path, stored in sorted(files.items())]
        sha = _sha1("\n".join([self.kind, self.repo_id, str(len(self.commits)), title, *names]))
        date = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        commit = Commit(sha, parent, title, files, date.replace("+00:00", "Z"))
        self.commits[sha] = commit
        return commit

    def ref_name(self, revision: str) -> str | None:
        """Full name of a branch, tag or pull request; `None` when there is none."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request or of a hash."""
        name = self.ref_name(revision)
        commit = self.refs[name] if name else self.commits.get(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def upload_mode(self, path: str, sample: bytes, size: int) -> str:
        """`"lfs"` or `"regular"`; what is no text never goes into git."""
        binary = b"\0" in sample or PurePosixPath(path).suffix.lower() in _LFS_SUFFIXES
        return "lfs" if binary or size > _LARGEST_REGULAR else "regular"

    def commit(self, revision: str, lines: Iterable[bytes], create_pr: bool) -> tuple[Commit, str]:
        """Apply the lines of a commit, all or none; returns the commit and the ref it went to."""
        parent = self.at(revision)
        name = self.ref_name(revision)
        if create_pr:
            name = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in self.refs)}"
        elif name is None or name.startswith("refs/tags/"):
            raise HubError(400, f"Commits go to branches and pull requests, not to {revision}.")
        files, header = dict(parent.files), {}
        for line in lines:
            operation = json.loads(line)
            if operation["key"] == "header":
                header = operation["value"]
            else:
                self._apply(files, operation["key"], operation["value"])
        if header.get("parentCommit", parent.sha) != parent.sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        if not header.get("summary"):
            raise HubError(400, "A commit needs a summary.")
        readme = files.get("README.md")
        if readme and (errors := metadata_errors(readme.content.decode(), self.kind)):
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        self.refs[name] = self._add(parent, header["summary"], files)
        return self.refs[name], name

    def put(self, folder: Path, title: str = "Upload") -> None:
        """Commit the files of a local folder to `main`, without a client."""
        parent, files = self.at("main"), {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            content, name = path.read_bytes(), path.relative_to(folder).as_posix()
            lfs = self.upload_mode(name, content[:512], len(content)) == "lfs"
            files[name] = StoredFile(content, lfs)
        self.refs["refs/heads/main"] = self._add(parent, title, {**parent.files, **files})

    def _apply(self, files: dict[str, StoredFile], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            if content and self.upload_mode(path, content[:512], len(content)) == "lfs":
                raise HubError(400, f"Your push was rejected: {path} must be stored with LFS.")
            files[path] = StoredFile(content, lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.objects:
                raise HubError(400, f"{path} points to an LFS object that does not exist.")
            files[path] = StoredFile(self.objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(400, f"{path} cannot be deleted: it is not there.")
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation {key!r} in a commit.")


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()
