"""Checkpoints that are complete or absent, hold only what was trained, and refuse to continue another run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors.torch import save_file

from diffusers_ext.core.artifacts import full_disk_named
from diffusers_ext.core.tensor_files import check_shapes, read_tensors
from diffusers_ext.training.run.checkpoint_files import (
    FOLDER_PREFIX,
    PARTIAL_PREFIX,
    REMEDY,
    check_no_checkpoints,
    check_same_facts,
    find_checkpoint,
    finish_checkpoint,
    list_checkpoints,
    random_states,
    read_checkpoint,
    read_part,
    read_random_states,
    remove_checkpoint,
    restore_random_states,
    write_state,
)

logger = get_logger(__name__)

KeepRule = Callable[[str, torch.nn.Parameter], bool]


def is_trainable(name: str, parameter: torch.nn.Parameter) -> bool:
    """The default rule of what a checkpoint keeps: parameters that require a gradient."""
    return parameter.requires_grad


class Stateful(Protocol):
    """What has a state beside models and optimizers: schedules, averages, logs."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, texts, tensors, and lists and dictionaries of them."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Go on from what `state_dict` gave."""


class Checkpoints:
    """Saves and restores a run below `output_dir` as `checkpoint-<step>` folders.

    A folder is written under another name and renamed when complete, so a killed run leaves no half checkpoint. All of
    it is safetensors and JSON. It holds the parameters that `keep` selects of the models that `accelerator` has
    prepared, their optimizers, the gradient scaler, `parts` and what else is registered, and the random states of
    every process.

    Args:
        fingerprint: JSON-able facts that must be equal for a run to be continued (model, data, seed, settings).
        every: steps between checkpoints; `None` writes none.
        total_limit: how many to keep; `None` keeps all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | os.PathLike,
        fingerprint: dict[str, Any],
        every: int | None = None,
        total_limit: int | None = None,
        keep: KeepRule = is_trainable,
        parts: Iterable[Stateful] = (),
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"`checkpointing_steps` must be at least 1, got {every}.")
        if total_limit is not None and total_limit < 1:
            raise ValueError(f"`checkpoints_total_limit` must be at least 1, got {total_limit}.")
        self.accelerator, self.output_dir = accelerator, Path(output_dir)
        self.every, self.total_limit = every, total_limit
        self.fingerprint, self.keep = json.loads(json.dumps(fingerprint, sort_keys=True)), keep
        self._parts: list[Stateful] = list(parts)

    def register(self, part: Stateful) -> None:
        """Also hold the state of `part`; in the same order in every run."""
        self._parts.append(part)

    def _kept(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return {name: parameter for name, parameter in model.named_parameters() if self.keep(name, parameter)}

    def _write(self, folder: Path) -> None:
        """Write the state of this process, and on the main one that of the run."""
        accelerator = self.accelerator
        states = {"step": accelerator.step, **random_states(accelerator.device)}
        write_state(states, folder / f"random_states_{accelerator.process_index}")
        if not accelerator.is_main_process:
            return
        for index, model in enumerate(accelerator._models):
            tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self._kept(model).items()}
            save_file(tensors, folder / f"trained_{index}.safetensors")
        for index, optimizer in enumerate(accelerator._optimizers):
            write_state(optimizer.state_dict(), folder / f"optimizer_{index}")
        if accelerator.scaler is not None:
            write_state(accelerator.scaler.state_dict(), folder / "scaler")
        for index, part in enumerate(self._parts):
            write_state(part.state_dict(), folder / f"part_{index}")

    def _read(self, folder: Path) -> None:
        """Bring back what `_write` wrote, or accelerate in an earlier version."""
        accelerator = self.accelerator
        for index, model in enumerate(accelerator._models):
            self._read_weights(model, folder / f"trained_{index}.safetensors")
        for index, optimizer in enumerate(accelerator._optimizers):
            _load(optimizer, folder, f"optimizer_{index}")
        if accelerator.scaler is not None:
            _load(accelerator.scaler, folder, "scaler")
        for index, part in enumerate(self._parts):
            _load(part, folder, f"part_{index}")
        states = read_random_states(folder, accelerator.process_index, accelerator.device)
        accelerator.step = states.pop("step", 0)
        path = folder / f"random_states_{accelerator.process_index}"
        restore_random_states(states, accelerator.device, path)

    def _read_weights(self, model: torch.nn.Module, path: Path) -> None:
        current = self._kept(model)
        stored, _ = read_tensors(path, remedy=REMEDY)
        if stored.keys() != current.keys():
            differing = sorted(stored.keys() ^ current.keys())
            raise ValueError(
                f"Checkpoint {path.parent} must hold the trained parameters of this run, differs in {differing[:4]}."
            )
        check_shapes({name: tuple(value.shape) for name, value in stored.items()}, current, path)
        with torch.no_grad():
            for name, parameter in current.items():
                parameter.copy_(stored[name])

    def save(self, step: int) -> None:
        """Write `checkpoint-<step>`; every process must call it."""
        folder, partial = (self.output_dir / f"{prefix}{step}" for prefix in (FOLDER_PREFIX, PARTIAL_PREFIX))
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        with full_disk_named(partial):
            self._write(partial)
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
        """Restore a checkpoint, `"latest"` or a folder, and return its step; `None` starts at step 0.

        Raises `ValueError` for no such checkpoint, an altered one, one of a run with other settings, and for a new run
        that would mix its checkpoints with those of an earlier one.
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
        self._read(folder)
        logger.info(f"Resumed from {folder}")
        return step


def _load(target: Stateful, folder: Path, name: str) -> None:
    """Read a state back, with the checkpoint named in errors."""
    state = read_part(folder, name)
    try:
        target.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"Checkpoint {folder} must fit this run, got a state that {type(target).__name__} does not "
            f"take: {error}. {REMEDY}"
        ) from error
