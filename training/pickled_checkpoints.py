"""Reading checkpoints of earlier versions, which accelerate pickled, without running what they hold."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

from accelerate.utils import load

from training.run_state import REMEDY


_DEVICE_STATES = {"cuda": "torch_cuda_manual_seed", "xpu": "torch_xpu_manual_seed"}


def is_pickled(folder: Path) -> bool:
    """Whether a checkpoint is one of an earlier version."""
    return (folder / "optimizer.bin").exists()


def read_pickled_optimizer(folder: Path, index: int) -> Any:
    """State of the optimizer of this index."""
    return _read(folder / (f"optimizer_{index}.bin" if index else "optimizer.bin"))


def read_pickled_part(folder: Path, index: int) -> Any:
    """State of a schedule, an average or anything else that has one."""
    return _read(folder / f"custom_checkpoint_{index}.pkl")


def read_pickled_scaler(folder: Path) -> Any:
    """State of the gradient scaler."""
    return _read(folder / "scaler.pt")


def read_pickled_random_states(folder: Path, process_index: int, device: Any) -> dict[str, Any]:
    """Random states of a process in the form of `training.run_state`, and `step` of the accelerator."""
    path = folder / f"random_states_{process_index}.pkl"
    found = _read(path)
    try:
        name, keys, *rest = found["numpy_random_seed"]
        states = {
            "step": found["step"],
            "python": found["random_state"],
            "numpy": [name, keys.tolist(), *rest],
            "torch": found["torch_manual_seed"],
        }
        if device.type in _DEVICE_STATES:  # accelerate kept those of all devices
            states[device.type] = found[_DEVICE_STATES[device.type]][device.index or 0]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold the random states of a process, got: {error!r}. {REMEDY}"
        ) from error
    return states


def _read(path: Path) -> Any:
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
            f"{path} must hold nothing but numbers; it is damaged or would run code, so it was not "
            f"loaded. {REMEDY}"
        ) from error
