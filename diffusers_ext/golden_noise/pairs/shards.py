"""One shard of a set of noise pairs on disk: its tensors, its tables, and what proves it whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from safetensors import safe_open
from safetensors.torch import save

from diffusers_ext.core import tensor_files as checked_tensors
from diffusers_ext.core.artifacts import file_sha256, write_atomically
from diffusers_ext.core.tensor_files import check_regular_file, is_sha256, read_tensors
from diffusers_ext.core.text_files import read_json

TENSOR = "delta"
TABLES = ("pairs", "rejected")
_SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "prompt": pa.string(),
        "seed": pa.int64(),
        "reward_source": pa.float64(),
        "reward_golden": pa.float64(),
        "mean": pa.float64(),
        "std": pa.float64(),
        "kurtosis": pa.float64(),
        "lag1_correlation": pa.float64(),
    }
)


class PairRecord(NamedTuple):
    """One row of the tables; the statistics are those of the last golden noise."""

    index: int  # among everything that was tried
    prompt: str
    seed: int  # of the source noise
    reward_source: float | None  # `None` without a filter
    reward_golden: float | None
    mean: float
    std: float
    kurtosis: float
    lag1_correlation: float


class ShardFiles(NamedTuple):
    """Where the files of one shard are; the shard is there once `summary` is."""

    tensors: Path
    pairs: Path
    rejected: Path
    summary: Path


def shard_files(folder: str | os.PathLike, shard: int) -> ShardFiles:
    """The paths of shard number `shard`."""
    folder, name = Path(folder), f"{shard:05d}"
    return ShardFiles(
        folder / "deltas" / f"{name}.safetensors",
        folder / "pairs" / f"{name}.parquet",
        folder / "rejected" / f"{name}.parquet",
        folder / "shards" / f"{name}.json",
    )


def list_shards(folder: str | os.PathLike) -> list[int]:
    """Numbers of the finished shards, in order."""
    return sorted(int(path.stem) for path in Path(folder, "shards").glob("[0-9]*.json"))


def write_shard(
    folder: str | os.PathLike,
    shard: int,
    deltas: torch.Tensor,
    pairs: Sequence[PairRecord],
    rejected: Sequence[PairRecord],
) -> None:
    """Write one shard; the summary, which says that it is there, comes last.

    Args:
        deltas: `(pairs, steps, channels, height, width)` float16, golden noises minus the source's.
    """
    files = shard_files(folder, shard)
    contents = [save({TENSOR: deltas.contiguous()})]
    for rows in (pairs, rejected):
        columns = {name: [getattr(row, name) for row in rows] for name in _SCHEMA.names}
        buffer = io.BytesIO()
        with parquet.ParquetWriter(buffer, _SCHEMA) as writer:
            if rows:  # `datasets` refuses an empty row group, not a table without one
                writer.write_table(pa.table(columns, schema=_SCHEMA))
        contents.append(buffer.getvalue())
    for path, content in zip(files, contents, strict=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    names = [f"{path.parent.name}/{path.name}" for path in files]
    summary = {
        "pairs": len(pairs),
        "rejected": len(rejected),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in zip(names, contents, strict=False)},
    }
    files.summary.parent.mkdir(exist_ok=True)
    write_atomically(files.summary, json.dumps(summary, indent=2) + "\n")


def read_table(path: str | os.PathLike) -> list[PairRecord]:
    """The rows of one table; raises `ValueError` where it is not one."""
    try:
        check_regular_file(path, _remedy(path))
        table = parquet.read_table(path)
    # Of the many ways in which bytes are no table, some end in errors of Python itself.
    except (pa.ArrowException, ArithmeticError, LookupError, MemoryError, OSError, ValueError) as error:
        raise ValueError(f"{path} must be a parquet table, got: {error}. {_remedy(path)}") from error
    missing = [name for name in _SCHEMA.names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} must have the columns {missing}, got {table.column_names}.")
    columns = (table.column(name).to_pylist() for name in PairRecord._fields)
    records = [PairRecord(*values) for values in zip(*columns, strict=True)]
    for row, record in enumerate(records):
        if not isinstance(record.prompt, str) or type(record.seed) is not int:
            raise ValueError(
                f"Row {row} of {path} must hold a prompt and a seed, got {record.prompt!r} and "
                f"{record.seed!r}. {_remedy(path)}"
            )
    return records


def check_shard(
    folder: str | os.PathLike, shard: int, item_shape: Sequence[int], verify: bool = True
) -> list[PairRecord]:
    """The rows of a shard, after a check that every one has its tensor.

    Args:
        item_shape: `(steps, channels, height, width)`.
    """
    files = shard_files(folder, shard)
    summary = read_json(files.summary)
    for name, expected in _sums(summary, files).items():
        path = Path(folder, name)
        if not path.is_file():
            raise ValueError(f"{folder} must hold {name}, got none. {_remedy(path)}")
        found = file_sha256(path) if verify else expected
        if found != expected:
            raise ValueError(
                f"{path} must have SHA-256 {expected[:12]}..., got {found[:12]}...: it is "
                f"truncated or was altered. {_remedy(path)}"
            )
    records = read_table(files.pairs)
    if verify:  # everything has been read once anyway
        read_tensors(files.tensors, dtypes=[torch.float16], remedy=_remedy(files.tensors))
    shape = tuple(open_tensors(files.tensors).get_slice(TENSOR).get_shape())
    if shape[1:] != tuple(item_shape):
        raise ValueError(f"{files.tensors} must hold noises of shape {tuple(item_shape)}, got {shape[1:]}.")
    if shape[0] != len(records):
        raise ValueError(
            f"Every row of {files.pairs} must have its tensor, got {len(records)} rows and "
            f"{shape[0]} tensors in {files.tensors.name}. {_remedy(files.pairs)}"
        )
    return records


def open_tensors(path: str | os.PathLike) -> safe_open:
    """A memory-mapped handle; raises `ValueError` where the file is no whole safetensors file."""
    handle = checked_tensors.open_tensors(path, _remedy(path))
    if TENSOR not in handle.keys():
        raise ValueError(f"{path} must hold the tensor {TENSOR!r}, got {sorted(handle.keys())}.")
    return handle


def _sums(summary: Any, files: ShardFiles) -> dict[str, str]:
    """The checksums of a shard's three files, of which none can be left out."""
    names = {f"{path.parent.name}/{path.name}" for path in files[:3]}
    sums = summary.get("sha256") if isinstance(summary, dict) else None
    if not isinstance(sums, dict) or sums.keys() != names:
        raise ValueError(
            f"{files.summary} must hold the SHA-256 of {sorted(names)}, got {sums!r:.200}. {_remedy(files.summary)}"
        )
    for name, value in sums.items():
        if not is_sha256(value):
            raise ValueError(
                f"{files.summary} must hold the SHA-256 of {name}, got {value!r}. {_remedy(files.summary)}"
            )
    return sums


def _remedy(path: str | os.PathLike) -> str:
    name = Path(path).stem
    return (
        f"Remove shards/{name}.json to leave this shard out, or to have it made again by "
        "`generate_npd.py --resume_from_checkpoint latest`."
    )
