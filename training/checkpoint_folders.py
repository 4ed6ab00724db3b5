"""Checkpoint folders on disk: complete or absent, listed, checked, removed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from diffusers_ext.core.settings import with_new_names
from diffusers_ext.eraser.recipe import EraserTraining
from training.pickled_checkpoints import is_pickled
from training.run_state import REMEDY


FOLDER_PREFIX, PARTIAL_PREFIX = "checkpoint-", ".partial-checkpoint-"
_RUN_FILE = "run.json"
_LONGEST_VALUE = 120  # characters of a value in an error message


def check_same_facts(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Raise `ValueError` unless the run that left `folder` had the facts of this one."""
    difference = _difference("", old, json.loads(json.dumps(new)))
    if difference is not None:
        name, before, now = difference
        raise ValueError(
            f"`{name}` must be the same to continue {folder}: it was {before}, got {now}. Use the old "
            "setting, or another `--output_dir` for a new run."
        )


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Complete checkpoints below `output_dir`, oldest first."""
    found = [
        folder
        for folder in Path(output_dir).glob(f"{FOLDER_PREFIX}*")
        if folder.name.removeprefix(FOLDER_PREFIX).isdecimal() and (folder / _RUN_FILE).is_file()
    ]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix(FOLDER_PREFIX)))


def check_no_checkpoints(output_dir: str | os.PathLike) -> None:
    """Raise `ValueError` where an earlier run has left checkpoints: two runs must not mix theirs."""
    present = [folder.name for folder in list_checkpoints(output_dir)]
    if present:
        raise ValueError(
            f"`output_dir` must hold no checkpoints of an earlier run, got {present} in {output_dir}. "
            "Pass `--resume_from_checkpoint latest` to continue it, or choose another folder."
        )


def find_checkpoint(output_dir: str | os.PathLike, which: str) -> Path:
    """The folder that `--resume_from_checkpoint` names; raises `ValueError` unless it is there, whole."""
    if which == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            raise ValueError(
                f"`resume_from_checkpoint` must name a checkpoint, got 'latest' but {output_dir} holds none."
            )
        return _unaltered(found[-1])
    for folder in (Path(which), Path(output_dir) / which):
        if (folder / _RUN_FILE).is_file():
            return _unaltered(folder)
    raise ValueError(
        f"`resume_from_checkpoint` must name a complete checkpoint folder, got {which!r}. "
        f"Present in {output_dir}: {[folder.name for folder in list_checkpoints(output_dir)]}."
    )


def read_checkpoint(folder: Path) -> tuple[int, dict[str, Any]]:
    """The steps that a checkpoint has behind it, and the facts of its run by today's names."""
    run = _read_run(folder)
    facts = run["fingerprint"]
    if "recipe" in facts:
        facts = {**facts, "recipe": with_new_names(facts["recipe"], EraserTraining)}
    return run["step"], facts


def finish_checkpoint(partial: Path, folder: Path, step: int, fingerprint: dict[str, Any]) -> None:
    """Give a completely written folder the name that makes it a checkpoint."""
    run = {"step": step, "fingerprint": fingerprint, "files": _hash_files(partial)}
    (partial / _RUN_FILE).write_text(json.dumps({**run, "sha256": _hash_run(run)}, indent=2))
    flush_folder(partial)
    if folder.exists():
        remove_checkpoint(folder)
    partial.rename(folder)


def _hash_run(run: dict[str, Any]) -> str:
    """SHA-256 of what a run file says, whatever its spaces and the order of its entries."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def _read_run(folder: Path) -> dict[str, Any]:
    """`run.json` of a checkpoint; raises `ValueError` unless it says what was written to it.

    Those of pickled checkpoints, which are older, hold no sum of themselves.
    """
    path, wrong = folder / _RUN_FILE, "JSON with a step, facts and the sums of files"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        given = run.pop("sha256", None)
        whole = (given is None and is_pickled(folder)) or given == _hash_run(run)
        kinds = {"step": int, "fingerprint": dict, "files": dict}
        fits = all(type(run.get(name)) is kind for name, kind in kinds.items())
    except (ValueError, AttributeError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"{path} must hold {wrong}, got: {error}. {REMEDY}") from error
    if not (whole and fits):
        state = "something else" if whole else "a sum that does not fit: it was altered"
        raise ValueError(f"{path} must hold {wrong}, got {state}. {REMEDY}")
    return run


def _difference(name: str, old: Any, new: Any) -> tuple[str, str, str] | None:
    """The dotted name and both values of the first entry in which two JSON values differ."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = _difference(f"{name}.{key}".lstrip("."), old.get(key), new.get(key))
            if found is not None:
                return found
        return None
    return None if old == new else (name, _shortened(old), _shortened(new))


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder but the one that is to hold these sums."""
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest = hashlib.sha256()
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
        sums[path.relative_to(folder).as_posix()] = digest.hexdigest()
    sums.pop(_RUN_FILE, None)
    return sums


def _unaltered(folder: Path) -> Path:
    """`folder`; raises `ValueError` unless it holds the files that were written to it."""
    expected_files, found = _read_run(folder)["files"], _hash_files(folder)
    for name, expected in expected_files.items():
        if expected != found.get(name):
            state = "missing" if name not in found else "truncated or altered"
            raise ValueError(
                f"`resume_from_checkpoint` must name a whole checkpoint, got {folder}, in which {name} "
                f"is {state}. Resume from an earlier one."
            )
    return folder


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; under its name it is there as a whole or not at all, at any moment."""
    doomed = folder.with_name(f"{PARTIAL_PREFIX}{folder.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def flush_folder(folder: Path) -> None:
    """Force a folder's files to disk before it gets its final name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
