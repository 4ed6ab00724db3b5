"""Checkpoints that are complete or absent, hold only what was trained, and refuse to continue another run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors.torch import load_file, save_file


logger = get_logger(__name__)

_FOLDER_PREFIX, _PARTIAL_PREFIX = "checkpoint-", ".partial-checkpoint-"
_RUN_FILE = "run.json"
KeepRule = Callable[[str, torch.nn.Parameter], bool]


def is_trainable(name: str, parameter: torch.nn.Parameter) -> bool:
    """The default rule of what a checkpoint keeps: parameters that require a gradient."""
    return parameter.requires_grad


class Checkpoints:
    """Saves and restores a run below `output_dir` as `checkpoint-<step>` folders.

    A folder is written under another name and renamed when complete, so a killed run leaves no half checkpoint.
    Model weights go to safetensors and hold only what `keep` selects; optimizer, schedule, scaler and random states
    are accelerate's.

    Args:
        accelerator: the run's accelerator; its save and load hooks are registered here.
        output_dir: folder of the run.
        fingerprint: JSON-able facts that must be equal for a run to be continued (model, data, seed, settings).
        every: steps between checkpoints; `None` writes none.
        total_limit: how many to keep; `None` keeps all.
        keep: which parameters a checkpoint holds.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | os.PathLike,
        fingerprint: dict[str, Any],
        every: int | None = None,
        total_limit: int | None = None,
        keep: KeepRule = is_trainable,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"`checkpointing_steps` must be at least 1, got {every}.")
        if total_limit is not None and total_limit < 1:
            raise ValueError(f"`checkpoints_total_limit` must be at least 1, got {total_limit}.")
        self.accelerator, self.output_dir, self.every, self.total_limit = (
            accelerator,
            Path(output_dir),
            every,
            total_limit,
        )
        self.fingerprint, self.keep = json.loads(json.dumps(fingerprint, sort_keys=True)), keep
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def _kept(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        model = self.accelerator.unwrap_model(model)
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if self.keep(name, parameter)
        }

    def _save_weights(self, models: list[torch.nn.Module], weights: list, output_dir: str) -> None:
        if self.accelerator.is_main_process:
            for index, model in enumerate(models):
                tensors = {
                    name: parameter.detach().cpu().contiguous()
                    for name, parameter in self._kept(model).items()
                }
                save_file(tensors, os.path.join(output_dir, f"trained_{index}.safetensors"))
        weights.clear()  # accelerate then writes no weights of its own

    def _load_weights(self, models: list[torch.nn.Module], input_dir: str) -> None:
        for index, model in enumerate(models):
            stored = load_file(os.path.join(input_dir, f"trained_{index}.safetensors"))
            current = self._kept(model)
            if stored.keys() != current.keys():
                differing = sorted(stored.keys() ^ current.keys())
                raise ValueError(
                    f"Checkpoint {input_dir} must hold the trained parameters of this run, differs in {differing[:4]}."
                )
            with torch.no_grad():
                for name, parameter in current.items():
                    parameter.copy_(stored[name])
        models.clear()  # accelerate then looks for no weights of its own

    def save(self, step: int) -> None:
        """Write `checkpoint-<step>`; every process must call it."""
        folder, partial = (
            self.output_dir / f"{_FOLDER_PREFIX}{step}",
            self.output_dir / f"{_PARTIAL_PREFIX}{step}",
        )
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (partial / _RUN_FILE).write_text(
                json.dumps({"step": step, "fingerprint": self.fingerprint}, indent=2)
            )
            _flush_folder(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            self._prune()
        self.accelerator.wait_for_everyone()
        logger.info(f"Saved {folder}")

    def _prune(self) -> None:
        if self.total_limit is not None:
            for folder in list_checkpoints(self.output_dir)[: -self.total_limit]:
                shutil.rmtree(folder)

    def resume(self, which: str | None) -> int:
        """Restore a checkpoint and return its step.

        Args:
            which: `None` starts at step 0; `"latest"` the newest checkpoint of `output_dir`; else a folder.

        Raises:
            ValueError: no such checkpoint, or it belongs to a run with other settings.
        """
        if which is None:
            return 0
        folder = find_checkpoint(self.output_dir, which)
        run = json.loads((folder / _RUN_FILE).read_text())
        for key in sorted(run["fingerprint"].keys() | self.fingerprint.keys()):
            old, new = run["fingerprint"].get(key), self.fingerprint.get(key)
            if old != new:
                raise ValueError(
                    f"`{key}` must be the same to continue {folder}: it was {old!r}, got {new!r}. "
                    "Use the old setting, or another `--output_dir` for a new run."
                )
        self.accelerator.load_state(str(folder))
        logger.info(f"Resumed from {folder}")
        return int(run["step"])


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Complete checkpoints below `output_dir`, oldest first."""
    found = [
        folder
        for folder in Path(output_dir).glob(f"{_FOLDER_PREFIX}*")
        if (folder / _RUN_FILE).is_file()
    ]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix(_FOLDER_PREFIX)))


def find_checkpoint(output_dir: str | os.PathLike, which: str) -> Path:
    """The folder that `--resume_from_checkpoint` names; raises `ValueError` where there is none."""
    if which == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            raise ValueError(
                f"`resume_from_checkpoint` must name a checkpoint, got 'latest' but {output_dir} holds none."
            )
        return found[-1]
    for folder in (Path(which), Path(output_dir) / which):
        if (folder / _RUN_FILE).is_file():
            return folder
    raise ValueError(
        f"`resume_from_checkpoint` must name a complete checkpoint folder, got {which!r}. "
        f"Present in {output_dir}: {[folder.name for folder in list_checkpoints(output_dir)]}."
    )


def _flush_folder(folder: Path) -> None:
    """Force a folder's files to disk before it gets its final name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
