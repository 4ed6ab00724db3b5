"""Which files of a set have been hashed: a set of many gigabytes is read whole once, and not at every start."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.text_files import read_json

logger = logging.getLogger(__name__)

RECORD_NAME = ".verified.json"
# A change within the clock's grain of the last one leaves the times as they were.
_SETTLED_NS = 2_000_000_000


class VerifiedFiles:
    """The files of a folder whose SHA-256 was found to be right, with the sizes and times that they had then.

    The record lies beside the set, in `.verified.json`, and belongs to this disk: copies have other times and are
    hashed again. A file that has changed since, or is younger than the record's clock can tell apart, is not held.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._known = self._read()
        self._added: dict[str, int] = {}  # bytes by name
        self._opened = time.time_ns()

    def _read(self) -> dict[str, Any]:
        path = self.folder / RECORD_NAME
        if not path.is_file():
            return {}
        try:
            known = read_json(path).get("files")
        except ValueError as error:
            logger.warning(f"{error} All files are hashed again.")
            return {}
        return known if isinstance(known, dict) else {}

    def holds(self, name: str, sha256: str) -> bool:
        """Whether a file is as it was when it had this checksum."""
        return self._known.get(name) == {"sha256": sha256, **_state(self.folder / name)}

    def add(self, name: str, sha256: str) -> None:
        """Note that a file has this checksum."""
        state = _state(self.folder / name)
        self._added[name] = state["size"]
        self._known.pop(name, None)
        if max(state["modified"], state["changed"]) < self._opened - _SETTLED_NS:
            self._known[name] = {"sha256": sha256, **state}

    def save(self) -> None:
        """Say what was hashed, and keep the record; a folder that cannot be written to keeps none."""
        if not self._added:
            return
        size = sum(self._added.values()) / 2**30
        logger.info(
            f"Hashed {len(self._added)} files of {self.folder} ({size:.2f} GiB): new, or changed since {RECORD_NAME} "
            "was written."
        )
        if not self._known:
            return
        content = json.dumps({"files": dict(sorted(self._known.items()))}, indent=1) + "\n"
        try:
            write_atomically(self.folder / RECORD_NAME, content)
        except OSError as error:
            logger.warning(f"{self.folder} keeps no record of its checksums ({error}): the next start hashes again.")


def _state(path: Path) -> dict[str, int]:
    found = path.stat()
    return {"size": found.st_size, "modified": found.st_mtime_ns, "changed": found.st_ctime_ns}
