"""Write a set of noise pairs batch by batch, so that a killed generation loses at most a batch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusers_ext.core.artifacts import CONFIG_NAME, sealed, write_atomically
from diffusers_ext.core.tensor_files import CONFIG_DIGEST, config_digest, read_tensors
from diffusers_ext.core.text_files import parse_json
from diffusers_ext.golden_noise.pairs.dataset import CLASS_NAME, FORMAT_VERSION, read_config
from diffusers_ext.golden_noise.pairs.shards import (
    TABLES,
    TENSOR,
    PairRecord,
    check_shard,
    list_shards,
    shard_files,
    write_shard,
)

_PROGRESS = "progress"
_REMEDY = "Remove it, and the run makes it again."
_CARD = """---
configs:
- config_name: pairs
  default: true
  data_files: pairs/*.parquet
- config_name: rejected
  data_files: rejected/*.parquet
---
"""


class Part(NamedTuple):
    """The result of one batch."""

    deltas: torch.Tensor  # (pairs, steps, channels, height, width) float16
    pairs: list[PairRecord]
    rejected: list[PairRecord]


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
        """Name the folder; nothing is written yet."""
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
        (self.folder / "report.json").unlink(missing_ok=True)
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
        for shard in list_shards(self.folder):
            check_shard(self.folder, shard, self.item_shape)

    def open_shards(self) -> list[int]:
        """Numbers of the shards that are still to be made."""
        return sorted(set(range(self.num_shards)) - set(list_shards(self.folder)))

    def read_part(self, shard: int, part: int) -> Part | None:
        """A part that is there; `None` where it is still to be made."""
        path = self._part_file(shard, part)
        if not path.is_file():
            return None
        tensors, metadata = read_tensors(path, dtypes=[torch.float16], remedy=_REMEDY)
        shape = tuple(tensors[TENSOR].shape) if tensors.keys() == {TENSOR} else None
        if shape is None or shape[1:] != self.item_shape or not metadata.keys() >= {*TABLES}:
            raise ValueError(
                f"{path} must hold noises of shape {self.item_shape} and {TABLES}, got {shape} and "
                f"{sorted(metadata)}. {_REMEDY}"
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
        """Keep the result of one batch.

        Args:
            deltas: `(pairs, steps, channels, height, width)`, golden noises minus their source.

        Raises:
            ValueError: a shape that does not fit, or values that are not finite in float16.
        """
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
        tensors = {TENSOR: deltas}
        path = self._part_file(shard, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, sealed(tensors, rows))

    def finish_shard(self, shard: int, num_parts: int) -> None:
        """Make a shard of its parts, which go."""
        parts = [self.read_part(shard, part) for part in range(num_parts)]
        missing = [number for number, part in enumerate(parts) if part is None]
        if missing:
            raise ValueError(f"Shard {shard} must have all its parts, got none for {missing}.")
        write_shard(
            self.folder,
            shard,
            torch.cat([part.deltas for part in parts]),
            [record for part in parts for record in part.pairs],
            [record for part in parts for record in part.rejected],
        )
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
