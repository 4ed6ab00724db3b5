"""The state of a run in safetensors and JSON, which run no code when they are read."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from diffusers_ext.core.checked_tensors import read_tensors


REMEDY = "Resume from another checkpoint, or start anew."
_PLAIN = (type(None), bool, int, str)


def write_state(state: Any, path: Path) -> None:
    """Write nested dictionaries, lists and tuples of numbers, texts and tensors.

    Args:
        state: what a `state_dict` gives. Keys may be numbers; floats come back to the bit.
        path: without an ending: `<path>.json` holds the structure, `<path>.safetensors` the tensors.

    Raises:
        TypeError: anything else inside, which only a pickle could hold.
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
        f"A state must be made of numbers, texts, tensors, lists and dictionaries, got a "
        f"{type(value).__name__}."
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
    """The states of all global generators that a process draws from.

    Args:
        device: of the process. Its generator alone, because other processes have the other ones.
    """
    name, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states[device.type] = _device_generator(device, "get_rng_state")()
    return states


def restore_random_states(states: dict[str, Any], device: torch.device, path: Path) -> None:
    """Make the global generators go on from `random_states`.

    Args:
        states: of the same process.
        device: of the process.
        path: named in errors.

    Raises:
        ValueError: a state is missing or broken: the run would go on with other random numbers.
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
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise ValueError(
            f"{path} must hold the random states of this process, got: {error}. {REMEDY}"
        ) from error


def _device_generator(device: torch.device, name: str) -> Any:
    """A function of the device's generator; that of `torch.mps` takes no device."""
    function = getattr(torch.get_device_module(device), name)
    if device.type == "mps":
        return function
    return lambda *state: function(*state, device)
