"""A checkpoint of a training where a result was asked for: what it is, and which folder to use."""

from __future__ import annotations

import os
import re
from pathlib import Path


_NAME = re.compile(r"checkpoint-\d+")
_FILES = ("run.json", "trained_0.safetensors")


def refuse_checkpoint(source: str | os.PathLike) -> None:
    """Raise `ValueError` for a checkpoint, a file of one, or a folder of nothing but checkpoints.

    Whoever loads results from folders asks this first. A checkpoint holds the state that a training
    goes on from: some weights under the names of the model that trains, and nothing to load them by.
    """
    path = Path(source)
    for folder in (path, path.parent) if path.is_file() else (path,):
        if is_checkpoint(folder):
            raise ValueError(
                f"{path} must be a result, got a checkpoint of a training, from which it can go on. Use "
                f"{folder.parent}, where the training writes its result at the end; to finish it, run its "
                f"command again with `--resume_from_checkpoint {folder.name}`."
            )
    if not path.is_dir():
        return
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    checkpoints = [entry for entry in entries if is_checkpoint(entry)]
    if checkpoints and not any(entry.is_file() for entry in entries):
        raise ValueError(
            f"{path} must hold a result, got a training that has not finished: {len(checkpoints)} "
            "checkpoints and no result. Run its command again with `--resume_from_checkpoint latest`."
        )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is what the training scripts call a checkpoint, under whatever name."""
    if all((folder / name).is_file() for name in _FILES):
        return True
    # Of a training that was stopped while it wrote, or that was copied in part.
    named = _NAME.fullmatch(folder.name) is not None
    return named and any((folder / name).is_file() for name in _FILES)
