"""Checkpoint folders on disk: complete or absent, listed, checked, removed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import load
from safetensors.torch import save_file

from diffusers_ext.core.artifacts import file_sha256
from diffusers_ext.core.settings import with_new_names
from diffusers_ext.core.tensor_files import read_tensors
from diffusers_ext.eraser.recipe import EraserTraining

FOLDER_PREFIX, PARTIAL_PREFIX = "checkpoint-", ".partial-checkpoint-"
REMEDY = "Resume from another checkpoint, or start anew."
_RUN_FILE = "run.json"
_LONGEST_VALUE = 120  # characters of a value in an error message
_PLAIN = (type(None), bool, int, str)
_DEVICE_STATES = {"cuda": "torch_cuda_manual_seed", "xpu": "torch_xpu_manual_seed"}


def is_pickled(folder: Path) -> bool:
    """Whether a checkpoint is one of an earlier version, in which accelerate pickled all but the weights."""
    return (folder / "optimizer.bin").exists()


def read_part(folder: Path, name: str) -> Any:
    """The state that a checkpoint of any version holds by this name; raises `ValueError` for a damaged file."""
    if not is_pickled(folder):
        return read_state(folder / name)
    kind, _, index = name.rpartition("_")
    names = {"scaler": "scaler.pt", "optimizer_0": "optimizer.bin"}
    endings = {"optimizer": f"{name}.bin", "part": f"custom_checkpoint_{index}.pkl"}
    return _unpickled(folder / names.get(name, endings.get(kind, f"{name}.pkl")))


def read_random_states(folder: Path, process_index: int, device: torch.device) -> dict[str, Any]:
    """Random states of a process as `random_states` gives them, and `step` of the accelerator."""
    name = f"random_states_{process_index}"
    found = read_part(folder, name)
    if not is_pickled(folder):
        return found
    try:
        kind, keys, *rest = found["numpy_random_seed"]
        states = {
            "step": found["step"],
            "python": found["random_state"],
            "numpy": [kind, keys.tolist(), *rest],
            "torch": found["torch_manual_seed"],
        }
        if device.type in _DEVICE_STATES:  # accelerate kept those of all devices
            states[device.type] = found[_DEVICE_STATES[device.type]][device.index or 0]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        path = folder / f"{name}.pkl"
        raise ValueError(f"{path} must hold the random states of a process, got: {error!r}. {REMEDY}") from error
    return states


def _unpickled(path: Path) -> Any:
    """What a file of `torch.save` holds, if that is tensors, arrays and plain containers alone."""
    try:
        return load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path} must be there, got no such file. {REMEDY}") from error
    except (
        pickle.UnpicklingError, EOFError, OSError, RuntimeError, ArithmeticError, AttributeError,
        LookupError, TypeError, ValueError, struct.error, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{path} must hold nothing but numbers; it is damaged or would run code, so it was not loaded. {REMEDY}"
        ) from error


def write_state(state: Any, path: Path) -> None:
    """Write nested dictionaries, lists and tuples of numbers, texts and tensors; floats come back to the bit.

    `<path>.json` holds the structure, `<path>.safetensors` the tensors. Raises `TypeError` for anything else inside,
    which only a pickle could hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_encode(state, tensors), allow_nan=False)
    if tensors:
        save_file(tensors, path.with_name(f"{path.name}.safetensors"))
    path.with_name(f"{path.name}.json").write_text(text, encoding="utf-8")


def read_state(path: Path) -> Any:
    """What `write_state` wrote, tensors on the CPU; raises `ValueError` for a damaged file."""
    structure, file = (path.with_name(f"{path.name}.{end}") for end in ("json", "safetensors"))
    tensors = read_tensors(file, finite=False, remedy=REMEDY)[0] if file.exists() else {}
    try:
        return _decode(json.loads(structure.read_text(encoding="utf-8")), tensors)
    except FileNotFoundError as error:
        raise ValueError(f"{structure} must be there, got no such file. {REMEDY}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{structure} must hold a state, got: {reason}. {REMEDY}") from error


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON of one kind of value each; all but plain ones and lists are `{kind: content}`."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # A copy, because safetensors takes no views of one memory.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    raise TypeError(
        f"A state must be made of numbers, texts, tensors, lists and dictionaries, got a {type(value).__name__}."
    )


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    raise ValueError(f"the unknown kind {kind!r}")


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all global generators of a process: of devices that of its own alone, the others have the rest."""
    name, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = _device_generator(device, "get_rng_state")()
    return states


def restore_random_states(states: dict[str, Any], device: torch.device, path: Path) -> None:
    """Make the global generators go on from `random_states` of the same process; `path` is named in errors.

    Raises `ValueError` where a state is missing or broken: the run would go on with other random numbers.
    """
    needed = {"python", "numpy", "torch"} | ({device.type} - {"cpu"})
    try:
        missing = sorted(needed - states.keys())
        if missing:
            raise ValueError(f"no state of {', '.join(missing)}")
        name, keys, *rest = states["numpy"]
        random.setstate(states["python"])
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(states["torch"])
        if device.type != "cpu":
            _device_generator(device, "set_rng_state")(states[device.type])
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} must hold the random states of this process, got: {error}. {REMEDY}") from error


def _device_generator(device: torch.device, name: str) -> Any:
    """A function of the device's generator; that of `torch.mps` takes no device."""
    function = getattr(torch.get_device_module(device), name)
    if device.type == "mps":
        return function
    return lambda *state: function(*state, device)


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
    for folder in (Path(which), Path(output_dir, which)):
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
    sums = {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
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
