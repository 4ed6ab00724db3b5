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

from training.checkpoint_folders import (
    FOLDER_PREFIX,
    PARTIAL_PREFIX,
    check_no_checkpoints,
    check_same_facts,
    find_checkpoint,
    finish_checkpoint,
    list_checkpoints,
    read_checkpoint,
    remove_checkpoint,
)


logger = get_logger(__name__)

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
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
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
            self.output_dir / f"{FOLDER_PREFIX}{step}",
            self.output_dir / f"{PARTIAL_PREFIX}{step}",
        )
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            finish_checkpoint(partial, folder, step, self.fingerprint)
            self._prune()
        self.accelerator.wait_for_everyone()
        logger.info(f"Saved {folder}")

    def _prune(self) -> None:
        if self.total_limit is not None:
            for folder in list_checkpoints(self.output_dir)[: -self.total_limit]:
                remove_checkpoint(folder)

    def resume(self, which: str | None) -> int:
        """Restore a checkpoint and return its step.

        Args:
            which: `None` starts at step 0; `"latest"` the newest checkpoint of `output_dir`; else a folder.

        Raises:
            ValueError: no such checkpoint, an altered one, one of a run with other settings, or a new
                run that would mix its checkpoints with those of an earlier one.
        """
        if self.accelerator.is_main_process:
            for partial in self.output_dir.glob(f"{PARTIAL_PREFIX}*"):
                shutil.rmtree(partial)
        if which is None:
            if self.every is not None:
                check_no_checkpoints(self.output_dir)
            return 0
        folder = find_checkpoint(self.output_dir, which)
        step, facts = read_checkpoint(folder)
        check_same_facts(facts, self.fingerprint, folder)
        self.accelerator.load_state(str(folder))
        logger.info(f"Resumed from {folder}")
        return step
