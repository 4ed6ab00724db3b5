"""Load altered artifacts, each in a process of its own, and say what became of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.campaign.artifacts import KINDS, Kind
from tests.campaign.mutations import MARKER, Mutation, mutations

SECONDS = 60.0  # a load takes well under one; the machine may be busy
MEMORY = 3 * 2**30  # more than any of the artifacts could need
REFUSALS = (ValueError, OSError, TypeError)
FAULTS = (
    "accepted though different", "NaN", "hang", "code ran", "memory", "obscure error",
    "names no file", "crash",
)  # fmt: skip


class Load(NamedTuple):
    """One load and its outcome; `detail` holds the error."""

    kind: str
    file: str
    mutation: str
    outcome: str
    detail: str = ""


class Case(NamedTuple):
    """One file of one kind, and one way to alter it."""

    kind: str
    folder: Path  # of the original
    file: str
    name: str
    mutation: Mutation


def cases(root: Path, seed: int = 0, kinds: dict[str, Kind] = KINDS) -> Iterator[Case]:
    """Make every kind below `root`, and every mutation of its files."""
    rng = random.Random(seed)
    for name, kind in kinds.items():
        folder = root / name.replace(" ", "_")
        folder.mkdir(parents=True)
        kind.make(folder)
        for pattern in kind.files:
            found = sorted(folder.glob(pattern))
            if not found:
                raise ValueError(f"{name} must write {pattern}, got none in {folder}.")
            for path in found:
                file = path.relative_to(folder).as_posix()
                for title, mutation in mutations(path, rng):
                    yield Case(name, folder, file, title, mutation)


class Campaign:
    """Loads cases and compares with the original, which is loaded once a kind."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self._originals: dict[str, dict[str, Any]] = {}

    def run(self, case: Case) -> Load:
        """Alter a copy, load it in a fork, and name what happened."""
        kind = KINDS[case.kind]
        if case.kind not in self._originals:
            found = _in_fork(kind, case.folder)
            if found.get("value") is None:
                raise ValueError(f"{case.kind} must load unaltered, got {found}.")
            self._originals[case.kind] = found
        altered = self.work / "altered"
        shutil.rmtree(altered, ignore_errors=True)
        shutil.copytree(case.folder, altered)
        marker = self.work / MARKER
        case.mutation(altered / case.file)
        found = _in_fork(kind, altered)
        ran = [path for path in (marker, altered / MARKER, Path(MARKER)) if path.exists()]
        for path in ran:
            path.rmdir()
        outcome, detail = self._judge(case, kind, found, altered)
        return Load(case.kind, case.file, case.name, "code ran" if ran else outcome, detail)

    def _judge(self, case: Case, kind: Kind, found: dict[str, Any], altered: Path) -> tuple[str, str]:
        if "ended" in found:
            return found["ended"], ""
        if "error" in found:
            detail = f"{found['error']}: {found['text']}"
            if found["memory"]:
                return "memory", detail
            if not found["refusal"]:
                return "obscure error", detail
            names = (Path(case.file).name, str(altered))
            named = any(name in found["text"] for name in names)
            return ("clear error" if named else "names no file"), detail
        if found["nan"]:
            return "NaN", ""
        original = self._originals[case.kind]
        if found["value"] == original["value"]:
            return "equal", ""
        if not kind.sealed and found["form"] == original["form"]:
            return "another value, which nothing can tell", ""
        if any(str(altered) in warning for warning in found["warnings"]):
            return "part of it, with a warning", found["warnings"][0][:300]
        return "accepted though different", ""


def _in_fork(kind: Kind, folder: Path) -> dict[str, Any]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(kind, folder, writer)
    os.close(writer)
    content, deadline = b"", time.monotonic() + SECONDS
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
            return {"ended": "hang"}
        part = os.read(reader, 1 << 16)
        if not part:
            break
        content += part
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    return json.loads(content) if content and status == 0 else {"ended": "crash"}


def _child(kind: Kind, folder: Path, writer: int) -> None:
    """Never returns: loads, tells the parent, and ends without any clean-up of the parent's."""
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(silent, descriptor)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        told = json.dumps(_loaded(kind, folder)).encode()
        while told:
            told = told[os.write(writer, told) :]
    finally:
        os._exit(0)


def _loaded(kind: Kind, folder: Path) -> dict[str, Any]:
    heard = Heard()
    logging.disable(logging.NOTSET)
    for name in ("diffusers_ext", "training"):
        logging.getLogger(name).addHandler(heard)
    try:
        value = kind.load(folder)
    except Exception as error:
        text = str(error)
        words = ("can't allocate memory", "Cannot allocate memory", "DefaultCPUAllocator")
        memory = isinstance(error, MemoryError) or any(word in text for word in words)
        last = traceback.extract_tb(sys.exc_info()[2])[-1]
        return {
            "error": type(error).__name__,
            "text": text[:3000],
            "refusal": isinstance(error, REFUSALS) and not isinstance(error, UnicodeError),
            "memory": memory and not isinstance(error, ValueError),
            "where": f"{last.filename}:{last.lineno}",
        }
    told = Description()
    told.add(value)
    return {
        "value": told.digest.hexdigest(), "form": told.form.hexdigest(), "nan": told.nan,
        "warnings": heard.warnings,
    }  # fmt: skip


class Heard(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())


class Description:
    """A digest of nested values to the bit, one of their form alone, and whether one is no number."""

    def __init__(self) -> None:
        self.digest, self.form, self.nan = hashlib.sha256(), hashlib.sha256(), False

    def add(self, value: Any) -> None:
        """Take in one value. Form is that of tensors: a text cut short is another text."""
        if isinstance(value, torch.Tensor):
            value = value.detach().contiguous()
            self.nan |= not bool(torch.isfinite(value).all())
            head = f"tensor {value.dtype} {tuple(value.shape)}".encode()
            self.digest.update(head + value.reshape(-1).view(torch.uint8).numpy().tobytes())
            self.form.update(head)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                self.digest.update(f"key {key!r}".encode())
                self.add(value[key])
        elif isinstance(value, (list, tuple)):
            self.digest.update(f"list {len(value)}".encode())
            for item in value:
                self.add(item)
        else:
            if isinstance(value, (float, np.floating)):
                self.nan |= not np.isfinite(value)
            self.digest.update(f"{type(value).__name__} {value!r}".encode())
            # In text, a list, a name or a number may be another one after any change of a letter.


def summary(loads: list[Load]) -> dict[str, int]:
    """How many loads ended how."""
    counts: dict[str, int] = {}
    for load in loads:
        counts[load.outcome] = counts.get(load.outcome, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def keep(loads: list[Load], path: Path) -> None:
    """Write what became of every load, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(load._asdict()) + "\n" for load in loads))


# A mutation that runs code pickles a class of this package; a reader that imports it must find it.
pickle.DEFAULT_PROTOCOL = max(pickle.DEFAULT_PROTOCOL, 4)
