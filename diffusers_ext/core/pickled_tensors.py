"""Tensors of files that `torch.save` wrote, without running the code that a pickle may hold."""

from __future__ import annotations

import os
import pickle
import struct
from typing import Any

import torch


def read_pickled_tensors(path: str | os.PathLike, *, mmap: bool = False) -> Any:
    """What a file of `torch.save` holds, on the CPU.

    Args:
        path: the file.
        mmap: map it into memory instead of reading it; only of the newer format, a zip file.

    Raises:
        pickle.UnpicklingError: other objects than tensors and plain containers, or no pickle.
        RuntimeError: a damaged file; `EOFError` and `OSError` likewise.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    # The unpickler takes any bytes for instructions, and fails as they happen to lead it.
    except (AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        raise pickle.UnpicklingError(f"{path} is no pickle: {error}") from error
