"""Tensors and configs in files of strangers: whole, finite, unaltered, and read without running code.

The safetensors library refuses a header that does not fit its file; here stands what it leaves open: what kind of file
it is, which tensors must be there, that they hold numbers, and whether file or config are as they were written.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import stat
import struct
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffusers_ext.hub.push import CONFIG_DIGEST, config_digest

# Name in the metadata of a weights file of the digest of the config that it was saved beside.
CONFIG_KEY = "diffusers_ext.config_sha256"
_SHA256 = re.compile("[0-9a-f]{64}")
# Of the safetensors library, which reads no more either.
MOST_HEADER_BYTES = 100_000_000
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REMEDY = "Download or write it again."
# Name in the metadata of what `tensors_digest` gave when the file was written.
DIGEST_KEY = "diffusers_ext.sha256"
_BLOCK = 1 << 22  # numbers looked at in one go


def is_sha256(value: object) -> bool:
    """Whether a value is a SHA-256 in hexadecimal digits; an empty string is none."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def check_sha256(config: Mapping[str, Any], name: str, path: str | os.PathLike) -> None:
    """Raise `ValueError` where an entry of a config is no SHA-256."""
    if not is_sha256(config[name]):
        raise ValueError(
            f"`{name}` must be a SHA-256 of 64 hexadecimal digits, got {config[name]!r} in {path}. {REMEDY}"
        )


def check_config_digest(config: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Raise `ValueError` where a config holds a digest of itself that is none or does not fit."""
    if CONFIG_DIGEST not in config:
        return  # written before there was one
    check_sha256(config, CONFIG_DIGEST, path)
    if config[CONFIG_DIGEST] != config_digest(config):
        raise ValueError(
            f"{path} must have the contents that it was written with, got others: its "
            f"`{CONFIG_DIGEST}` does not fit. Download or write it again."
        )


def check_format_version(config: Mapping[str, Any], path: str | os.PathLike, newest: int) -> None:
    """Raise `ValueError` where a config is of no format, or of one that only a newer version reads."""
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"`format_version` must be a positive integer, got {version!r} in {path}.")
    if version > newest:
        raise ValueError(f"`format_version` must be at most {newest}, got {version} in {path}. Update diffusers_ext.")


def check_regular_file(path: str | os.PathLike, remedy: str = REMEDY) -> Path:
    """The path of a file of bytes; a pipe or a device, which may never end, is not even opened."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} must be a file, got: {reason}. {remedy}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise ValueError(f"{path} must be a file, got {kind}. {remedy}")
    return Path(path)


def open_tensors(path: str | os.PathLike, remedy: str = REMEDY) -> safe_open:
    """A memory-mapped handle, after a look at the file and at the length of its header.

    Whoever reads single rows of a large file uses it, and checks what it takes with `check_finite`.
    """
    path = check_regular_file(path, remedy)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise ValueError(
                f"{path} must be a whole safetensors file, got a header of {length} bytes in a file "
                f"of {size}. {remedy}"
            )
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got: {error}. {remedy}") from error


def read_tensors(
    path: str | os.PathLike,
    *,
    dtypes: Collection[torch.dtype] | None = None,
    finite: bool = True,
    remedy: str = REMEDY,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata; checked, also by the digest in it."""
    handle = open_tensors(path, remedy)
    try:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        metadata = dict(handle.metadata() or {})
    # Of tensors whose dtype this torch does not have, or which do not fit into memory.
    except (SafetensorError, OSError, RuntimeError, MemoryError, AttributeError) as error:
        raise ValueError(f"{path} must hold tensors, got: {error}. {remedy}") from error
    check_tensors(tensors, path, dtypes=dtypes, finite=finite, remedy=remedy)
    # A file of another program, or of before there were digests, has none.
    if DIGEST_KEY in metadata and tensors_digest(tensors, metadata) != metadata[DIGEST_KEY]:
        raise ValueError(
            f"{path} must have the contents that it was written with, got others: the digest in its metadata does not "
            f"fit. {remedy} If a program changed it on purpose, have it leave out {DIGEST_KEY!r} of the metadata."
        )
    return tensors, metadata


def check_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike,
    *,
    expected: Mapping[str, Sequence[int] | torch.Tensor] | None = None,
    dtypes: Collection[torch.dtype] | None = None,
    finite: bool = True,
    remedy: str = REMEDY,
) -> None:
    """Raise `ValueError` where the tensors of a file, which is only named, are not as they must be.

    Args:
        expected: all names that must be there and no others, each with its shape, or with a tensor (also on `meta`)
            whose shape and dtype it must have; any names when `None`.
        dtypes: those that tensors may have, such as `FLOATING`; any when `None`.
    """
    if expected is not None:
        check_shapes({k: tuple(v.shape) for k, v in tensors.items()}, expected, path, remedy)
    for name, tensor in tensors.items():
        model = (expected or {}).get(name)
        allowed = [model.dtype] if isinstance(model, torch.Tensor) else dtypes
        if allowed is not None and tensor.dtype not in allowed:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise ValueError(
                f"{path} must hold {name!r} in {names}, got {str(tensor.dtype).removeprefix('torch.')}. {remedy}"
            )
        if finite:
            check_finite(tensor, name, path, remedy)


def check_shapes(
    shapes: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int] | torch.Tensor],
    path: str | os.PathLike,
    remedy: str = REMEDY,
) -> None:
    """Raise `ValueError` unless a file's tensors have all expected names, no others, and their shapes."""
    missing, surplus = sorted(expected.keys() - shapes), sorted(shapes.keys() - expected)
    if missing or surplus:
        parts = [f"{len(missing)} missing: {_some(missing)}"] if missing else []
        parts += [f"{len(surplus)} that are not expected: {_some(surplus)}"] if surplus else []
        raise ValueError(
            f"{path} must hold the {len(expected)} tensors that its config describes, got "
            f"{', and '.join(parts)}. {remedy}"
        )
    for name, model in expected.items():
        wanted = tuple(model.shape if isinstance(model, torch.Tensor) else model)
        if tuple(shapes[name]) != wanted:
            raise ValueError(f"{path} must hold {name!r} of shape {wanted}, got {tuple(shapes[name])}. {remedy}")


def check_finite(tensor: torch.Tensor, name: str, path: str | os.PathLike, remedy: str = REMEDY) -> None:
    """Raise `ValueError` where a tensor holds NaN or infinity; integers hold neither."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return
    if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):
        return  # all its 16 values are numbers
    flat = tensor.detach().reshape(-1)
    for block in flat.split(_BLOCK):
        # float8 has no operations of its own.
        values = block.float() if block.element_size() == 1 else block
        if not torch.isfinite(values).all():
            raise ValueError(f"{path} must hold finite numbers, got NaN or infinity in {name!r}. {remedy}")


def tensors_digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of tensors in any order, and of the metadata without `DIGEST_KEY`."""
    kept = {name: value for name, value in (metadata or {}).items() if name != DIGEST_KEY}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            for block in tensor.reshape(-1).view(torch.uint8).split(_BLOCK):
                digest.update(memoryview(block.numpy()))
    return digest.hexdigest()


def with_digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> dict[str, str]:
    """The metadata to write with tensors, so that `read_tensors` finds what was altered later."""
    return {**(metadata or {}), DIGEST_KEY: tensors_digest(tensors, metadata)}


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")


def read_pickled_tensors(
    path: str | os.PathLike, *, mmap: bool = False, finite: bool = True, remedy: str = REMEDY
) -> Any:
    """What a file of `torch.save` holds, on the CPU; `mmap` is of the newer format alone, a zip file."""
    path = check_regular_file(path, remedy)
    _check_zip(path, remedy)
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    # torch reports a truncated zip file as an `OSError` or a `RuntimeError`.
    except (EOFError, OSError, RuntimeError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be a whole file of `torch.save`, got: {_first_line(error)} {remedy}") from error
    # The unpickler takes any bytes for instructions, and fails as they happen to lead it.
    except (
        pickle.UnpicklingError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
        struct.error,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{path} must hold nothing but tensors; it is damaged or would run code, so it was not loaded. {remedy}"
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
        raise ValueError(f"{path} must be a whole file of `torch.save`, got: {_first_line(error)} {remedy}") from error
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError(
            f"{path} must hold its tensors as they are, got a zip file that unpacks to more than its "
            f"own size. {remedy}"
        )


def _check_tree(tree: Any, path: Path, finite: bool, remedy: str) -> None:
    """Refuse tensors that claim more memory than the file can account for.

    A tensor of stride 0 has any number of elements on four bytes, until somebody copies it. Names may share weights,
    so some more than the file's size is allowed.
    """
    total = 0
    for name, tensor in _tensors_in(tree):
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(
                f"{path} must hold dense tensors, got {name!r} as {tensor.layout} on {tensor.device}. {remedy}"
            )
        total += tensor.numel() * tensor.element_size()
        if total > 4 * path.stat().st_size:
            raise ValueError(
                f"{path} must hold its tensors as they are, got {name!r} of shape {tuple(tensor.shape)}, more than "
                f"the file of {path.stat().st_size} bytes holds. {remedy}"
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
