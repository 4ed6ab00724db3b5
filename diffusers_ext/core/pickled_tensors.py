"""Tensors of files that `torch.save` wrote, without running the code that a pickle may hold."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.core.checked_tensors import REMEDY, check_finite, check_regular_file


def read_pickled_tensors(
    path: str | os.PathLike, *, mmap: bool = False, finite: bool = True, remedy: str = REMEDY
) -> Any:
    """What a file of `torch.save` holds, on the CPU.

    Args:
        mmap: map it into memory instead of reading it; only of the newer format, a zip file.
    """
    path = check_regular_file(path, remedy)
    _check_zip(path, remedy)
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    # torch reports a truncated zip file as an `OSError` or a `RuntimeError`.
    except (EOFError, OSError, RuntimeError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} must be a whole file of `torch.save`, got: {_first_line(error)} {remedy}"
        ) from error
    # The unpickler takes any bytes for instructions, and fails as they happen to lead it.
    except (
        pickle.UnpicklingError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
        struct.error,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{path} must hold nothing but tensors; it is damaged or would run code, so it was not "
            f"loaded. {remedy}"
        ) from error
    _check_tree(tree, path, finite, remedy)
    return tree


def _check_zip(path: Path, remedy: str) -> None:
    """Refuse what unpacks to more than it is; `torch.save` compresses nothing."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise ValueError(
            f"{path} must be a whole file of `torch.save`, got: {_first_line(error)} {remedy}"
        ) from error
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError(
            f"{path} must hold its tensors as they are, got a zip file that unpacks to more than its "
            f"own size. {remedy}"
        )


def _check_tree(tree: Any, path: Path, finite: bool, remedy: str) -> None:
    """Refuse tensors that claim more memory than the file can account for.

    A tensor of stride 0 has any number of elements on four bytes, until somebody copies it. Names
    may share weights, so some more than the file's size is allowed.
    """
    total = 0
    for name, tensor in _tensors_in(tree):
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(
                f"{path} must hold dense tensors, got {name!r} as {tensor.layout} on "
                f"{tensor.device}. {remedy}"
            )
        total += tensor.numel() * tensor.element_size()
        if total > 4 * path.stat().st_size:
            raise ValueError(
                f"{path} must hold its tensors as they are, got {name!r} of shape "
                f"{tuple(tensor.shape)}, more than the file of {path.stat().st_size} bytes holds. "
                f"{remedy}"
            )
        if finite:
            check_finite(tensor, name, path, remedy)


def _tensors_in(tree: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in nested containers, with where they are; no container is entered twice."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("the tensor", tree)]
    while waiting:
        name, item = waiting.pop()
        if isinstance(item, torch.Tensor):
            yield name, item
        elif isinstance(item, (dict, list, tuple, set)) and id(item) not in seen:
            seen.add(id(item))
            pairs = item.items() if isinstance(item, dict) else enumerate(item)
            inside = "" if item is tree else f"{name}."
            waiting += [(f"{inside}{key}", value) for key, value in pairs]


def _first_line(error: BaseException) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0][:200]
    return text if text.endswith(".") else f"{text}."
