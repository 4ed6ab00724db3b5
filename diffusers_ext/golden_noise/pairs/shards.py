"""The files of a set of noise pairs: its config, its shards, and a writer that a kill costs at most a batch."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, get_type_hints

import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from safetensors import safe_open
from safetensors.torch import save

from diffusers_ext.core.artifacts import CONFIG_NAME, file_sha256, sealed, write_atomically
from diffusers_ext.core.tensor_files import (
    CONFIG_DIGEST,
    check_config_digest,
    check_format_version,
    check_regular_file,
    config_digest,
    is_sha256,
    open_tensors,
    read_tensors,
)
from diffusers_ext.core.text_files import parse_json, read_json
from diffusers_ext.golden_noise.pairs.verified import RECORD_NAME, VerifiedFiles
from diffusers_ext.hub import Measured

CLASS_NAME, FORMAT_VERSION = "PairDataset", 1
TENSOR = "delta"
TABLES = ("pairs", "rejected")
_PROGRESS = "progress"
_PART_REMEDY = "Remove it, and the run makes it again."
_CARD = """---
configs:
- config_name: pairs
  default: true
  data_files: pairs/*.parquet
- config_name: rejected
  data_files: rejected/*.parquet
---
"""


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


_ARROW_TYPES = {int: pa.int64(), str: pa.string()}
_SCHEMA = pa.schema({name: _ARROW_TYPES.get(kind, pa.float64()) for name, kind in get_type_hints(PairRecord).items()})


class ShardFiles(NamedTuple):
    """Where the files of one shard are; the shard is there once `summary` is."""

    tensors: Path
    pairs: Path
    rejected: Path
    summary: Path


def shard_files(folder: str | os.PathLike, shard: int) -> ShardFiles:
    """Where a shard of this number is."""
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


class Part(NamedTuple):
    """What a batch of candidates, or a whole shard, holds."""

    deltas: torch.Tensor  # golden noises minus their source, (pairs, steps, channels, height, width) float16
    pairs: list[PairRecord]
    rejected: list[PairRecord]


def write_shard(folder: str | os.PathLike, shard: int, content: Part) -> None:
    """Write one shard; the summary, which says that it is there, comes last."""
    files = shard_files(folder, shard)
    contents = [save({TENSOR: content.deltas.contiguous()})]
    for rows in (content.pairs, content.rejected):
        buffer = io.BytesIO()
        with parquet.ParquetWriter(buffer, _SCHEMA) as writer:
            if rows:  # `datasets` refuses an empty row group, not a table without one
                writer.write_table(pa.Table.from_pylist([row._asdict() for row in rows], schema=_SCHEMA))
        contents.append(buffer.getvalue())
    sums = {}
    for path, data in zip(files[:3], contents, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        sums[f"{path.parent.name}/{path.name}"] = hashlib.sha256(data).hexdigest()
    summary = {"pairs": len(content.pairs), "rejected": len(content.rejected), "sha256": sums}
    files.summary.parent.mkdir(exist_ok=True)
    write_atomically(files.summary, json.dumps(summary, indent=2) + "\n")


def read_table(path: str | os.PathLike) -> list[PairRecord]:
    """The rows of one table; raises `ValueError` where it is not one."""
    remedy = _remedy(path)
    try:
        check_regular_file(path, remedy)
        table = parquet.read_table(path)
    # Of the many ways in which bytes are no table, some end in errors of Python itself.
    except (pa.ArrowException, ArithmeticError, LookupError, MemoryError, OSError, ValueError) as error:
        raise ValueError(f"{path} must be a parquet table, got: {error}. {remedy}") from error
    missing = [name for name in _SCHEMA.names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} must have the columns {missing}, got {table.column_names}.")
    records = [PairRecord(**row) for row in table.select(_SCHEMA.names).to_pylist()]
    for row, record in enumerate(records):
        if not isinstance(record.prompt, str) or type(record.seed) is not int:
            raise ValueError(
                f"Row {row} of {path} must hold a prompt and a seed, got {record.prompt!r} and "
                f"{record.seed!r}. {remedy}"
            )
    return records


def num_rejected(folder: str | os.PathLike) -> int:
    """How many pairs the filter of a set has refused."""
    return sum(len(read_table(shard_files(folder, shard).rejected)) for shard in list_shards(folder))


def judged_pairs(folder: str | os.PathLike) -> list[PairRecord]:
    """All pairs that were tried and judged, also those that the filter refused; none without a reward."""
    shards = [shard_files(folder, shard) for shard in list_shards(folder)]
    tables = [table for files in shards for table in (files.pairs, files.rejected)]
    tried = [record for table in tables for record in read_table(table)]
    return [record for record in tried if record.reward_golden is not None]


def measured(folder: str | os.PathLike) -> list[Measured]:
    """Win rate and mean rewards over all pairs that were tried; nothing without a reward."""
    judged = judged_pairs(folder)
    if not judged:
        return []
    figures = {
        "win rate": fmean(record.reward_golden > record.reward_source for record in judged),
        "mean reward of random noise": fmean(record.reward_source for record in judged),
        "mean reward of golden noise": fmean(record.reward_golden for record in judged),
    }
    notes = f"{len(judged)} pairs, before the filter"
    return [Measured("the prompts of this set", metric, value, notes=notes) for metric, value in figures.items()]


def check_shard(
    folder: str | os.PathLike, shard: int, item_shape: Sequence[int], verified: VerifiedFiles | None = None
) -> list[PairRecord]:
    """The rows of a shard, after a check that every one has its tensor `(steps, channels, height, width)`.

    Checksums are compared of files that are not among the `verified` ones; of none when `None`.
    """
    files = shard_files(folder, shard)
    remedy = _remedy(files.summary)
    for name, expected in _sums(files, remedy).items():
        path = Path(folder, name)
        if not path.is_file():
            raise ValueError(f"{folder} must hold {name}, got none. {remedy}")
        if verified is None or verified.holds(name, expected):
            continue
        found = file_sha256(path)
        if found != expected:
            raise ValueError(
                f"{path} must have SHA-256 {expected[:12]}..., got {found[:12]}...: it is "
                f"truncated or was altered. {remedy}"
            )
        if path == files.tensors:  # it has been read once anyway
            read_tensors(path, dtypes=[torch.float16], remedy=remedy)
        verified.add(name, expected)
    records = read_table(files.pairs)
    shape = tuple(open_deltas(files.tensors).get_slice(TENSOR).get_shape())
    if shape[1:] != tuple(item_shape):
        raise ValueError(f"{files.tensors} must hold noises of shape {tuple(item_shape)}, got {shape[1:]}.")
    if shape[0] != len(records):
        raise ValueError(
            f"Every row of {files.pairs} must have its tensor, got {len(records)} rows and "
            f"{shape[0]} tensors in {files.tensors.name}. {remedy}"
        )
    return records


def open_deltas(path: str | os.PathLike) -> safe_open:
    """A memory-mapped handle; raises `ValueError` where the file is no whole safetensors file."""
    handle = open_tensors(path, _remedy(path))
    if TENSOR not in handle.keys():
        raise ValueError(f"{path} must hold the tensor {TENSOR!r}, got {sorted(handle.keys())}.")
    return handle


def _sums(files: ShardFiles, remedy: str) -> dict[str, str]:
    """The checksums of a shard's three files, of which none can be left out."""
    names = {f"{path.parent.name}/{path.name}" for path in files[:3]}
    sums = read_json(files.summary).get("sha256")
    if not isinstance(sums, dict) or sums.keys() != names:
        raise ValueError(f"{files.summary} must hold the SHA-256 of {sorted(names)}, got {sums!r:.200}. {remedy}")
    for name, value in sums.items():
        if not is_sha256(value):
            raise ValueError(f"{files.summary} must hold the SHA-256 of {name}, got {value!r}. {remedy}")
    return sums


def _remedy(path: str | os.PathLike) -> str:
    name = Path(path).stem
    return (
        f"Remove shards/{name}.json to leave this shard out, or to have it made again by "
        "`generate_npd.py --resume_from_checkpoint latest`."
    )


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The config of a native folder; raises `ValueError` where there is none of this format."""
    path = Path(folder, CONFIG_NAME)
    if not path.is_file():
        raise ValueError(
            f"{folder} must be a folder of noise pairs, got none of config.json, metadata.csv and *.npz in it."
        )
    config = read_json(path)
    if config.get("_class_name") != CLASS_NAME:
        raise ValueError(f"{path} must describe a {CLASS_NAME}, got {config.get('_class_name')!r}.")
    check_config_digest(config, path)
    check_format_version(config, path, FORMAT_VERSION)
    # What reading the set relies on.
    shape = config.get("latent_shape")
    numbers = {name: config.get(name) for name in ("num_steps", "num_shards")}
    sizes = dict(enumerate(shape if isinstance(shape, list) and len(shape) == 3 else [None]))
    numbers |= {f"latent_shape[{index}]": size for index, size in sizes.items()}
    for name, value in numbers.items():
        least = 0 if name == "num_shards" else 1
        if type(value) is not int or not least <= value < 2**31:
            raise ValueError(f"`{name}` must be a number from {least}, got {value!r} in {path}.")
    if not isinstance(config.get("facts", False), (dict, type(None))):
        raise ValueError(f"`facts` must be an object or null, got {config.get('facts')!r} in {path}.")
    return config


class PairWriter:
    """The folder of one generation, cut in advance into shards and batches ("parts") of a shard.

    A part is one file, a shard is there once its summary is, and a shard replaces its parts: at any moment the folder
    says exactly what is done. Several processes may write different shards.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        latent_shape: Sequence[int],
        num_steps: int,
        num_shards: int,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.item_shape = (num_steps, *latent_shape)
        self.num_shards = num_shards
        self.facts = facts

    def create(self) -> None:
        """Start a set; raises `ValueError` where the folder already holds one."""
        if (self.folder / CONFIG_NAME).exists():
            raise ValueError(
                f"`output_dir` must hold no pairs of an earlier run, got some in {self.folder}. Pass "
                "`--resume_from_checkpoint latest` to continue it, or choose another folder."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        config = {
            "_class_name": CLASS_NAME,
            "format_version": FORMAT_VERSION,
            "num_steps": self.item_shape[0],
            "latent_shape": list(self.item_shape[1:]),
            "num_shards": self.num_shards,
            "facts": self.facts,
        }
        config[CONFIG_DIGEST] = config_digest(json.loads(json.dumps(config, allow_nan=False)))
        write_atomically(self.folder / "README.md", _CARD)
        write_atomically(self.folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")

    def discard(self) -> None:
        """Remove the set that the folder holds, its config first; other files stay."""
        (self.folder / CONFIG_NAME).unlink(missing_ok=True)
        for shard in list_shards(self.folder):
            for path in reversed(shard_files(self.folder, shard)):
                path.unlink(missing_ok=True)
        for name in ("report.json", RECORD_NAME):
            (self.folder / name).unlink(missing_ok=True)
        self.clean_up()

    def check(self) -> None:
        """Raise `ValueError` where the folder holds another set than this, or a broken shard."""
        config = read_config(self.folder)
        found = (config["num_steps"], *config["latent_shape"], config["num_shards"])
        if found != (*self.item_shape, self.num_shards):
            raise ValueError(
                f"{self.folder} must hold noises of shape {self.item_shape} in {self.num_shards} "
                f"shards, got {found[:-1]} in {found[-1]}."
            )
        verified = VerifiedFiles(self.folder)
        for shard in list_shards(self.folder):
            check_shard(self.folder, shard, self.item_shape, verified)
        verified.save()

    def open_shards(self) -> list[int]:
        """Numbers of the shards that are still to be made."""
        return sorted(set(range(self.num_shards)) - set(list_shards(self.folder)))

    def read_part(self, shard: int, part: int) -> Part | None:
        """A part that is there; `None` where it is still to be made."""
        path = self._part_file(shard, part)
        if not path.is_file():
            return None
        tensors, metadata = read_tensors(path, dtypes=[torch.float16], remedy=_PART_REMEDY)
        shape = tuple(tensors[TENSOR].shape) if tensors.keys() == {TENSOR} else None
        if shape is None or shape[1:] != self.item_shape or not metadata.keys() >= {*TABLES}:
            raise ValueError(
                f"{path} must hold noises of shape {self.item_shape} and {TABLES}, got {shape} and "
                f"{sorted(metadata)}. {_PART_REMEDY}"
            )
        rows = {name: parse_json(metadata[name], path, list) for name in TABLES}
        tables = {name: [PairRecord(*row) for row in found] for name, found in rows.items()}
        return Part(tensors[TENSOR], **tables)

    def write_part(
        self,
        shard: int,
        part: int,
        deltas: torch.Tensor,
        pairs: Sequence[PairRecord],
        rejected: Sequence[PairRecord] = (),
    ) -> None:
        """Keep the result of one batch, a `Part`; raises `ValueError` for deltas that are not finite in float16."""
        if deltas.shape != (len(pairs), *self.item_shape):
            raise ValueError(f"`deltas` must be {(len(pairs), *self.item_shape)}, got {tuple(deltas.shape)}.")
        deltas = deltas.detach().to("cpu", torch.float16).contiguous()
        broken = ~torch.isfinite(deltas).flatten(1).all(1)
        if broken.any():
            first = pairs[int(broken.nonzero()[0])]
            raise ValueError(
                f"Golden noise must be finite, got NaN or infinity for {first.prompt!r}, seed "
                f"{first.seed}. Use float32 or bfloat16."
            )
        rows = {name: json.dumps(table) for name, table in zip(TABLES, (pairs, rejected))}
        path = self._part_file(shard, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, sealed({TENSOR: deltas}, rows))

    def finish_shard(self, shard: int, num_parts: int) -> None:
        """Make a shard of its parts, which go."""
        parts = [self.read_part(shard, part) for part in range(num_parts)]
        missing = [number for number, part in enumerate(parts) if part is None]
        if missing:
            raise ValueError(f"Shard {shard} must have all its parts, got none for {missing}.")
        deltas, pairs, rejected = zip(*parts)
        write_shard(self.folder, shard, Part(torch.cat(deltas), list(chain(*pairs)), list(chain(*rejected))))
        shutil.rmtree(self._part_file(shard, 0).parent)

    def clean_up(self) -> None:
        """Remove parts and what killed runs have left half written, once all shards are there."""
        shutil.rmtree(self.folder / _PROGRESS, ignore_errors=True)
        for ending in ("json", "md", "parquet", "safetensors"):
            for depth in ("", "*/"):
                for path in self.folder.glob(f"{depth}.*.{ending}.*"):
                    path.unlink()

    def _part_file(self, shard: int, part: int) -> Path:
        return self.folder / _PROGRESS / f"{shard:05d}" / f"{part:05d}.safetensors"
