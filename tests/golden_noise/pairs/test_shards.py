from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusers_ext.golden_noise.pairs import shards as pair_shards
from diffusers_ext.golden_noise.pairs.dataset import open_pairs
from diffusers_ext.golden_noise.pairs.shards import check_shard, shard_files
from tests.golden_noise.pair_sets import SHAPE, STEPS, write_set


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def drop_a_tensor(path: Path) -> None:
    path.write_bytes(pair_shards.save({"delta": torch.zeros(3, STEPS, *SHAPE).half()}))


def drop_the_tensor(path: Path) -> None:
    path.write_bytes(pair_shards.save({"other": torch.zeros(4)}))


def other_shape(path: Path) -> None:
    path.write_bytes(pair_shards.save({"delta": torch.zeros(4, STEPS, 16, 8, 8).half()}))


@pytest.mark.parametrize(
    ("harm", "file", "verify", "message"),
    [
        (truncate, "tensors", True, "must have SHA-256 .*: it is truncated or was altered. Remove"),
        (truncate, "tensors", False, "00000.safetensors must be a whole safetensors file, got: "),
        (flip, "tensors", True, "must have SHA-256 .*: it is truncated or was altered"),
        (truncate, "pairs", True, "00000.parquet must have SHA-256"),
        (truncate, "pairs", False, "00000.parquet must be a parquet table, got: "),
        (Path.unlink, "tensors", True, "must hold deltas/00000.safetensors, got none"),
        (drop_a_tensor, "tensors", False, "must have its tensor, got 4 rows and 3 tensors"),
        (drop_the_tensor, "tensors", False, r"must hold the tensor 'delta', got \['other'\]"),
        (other_shape, "tensors", False, r"noises of shape \(2, 4, 8, 8\), got \(2, 16, 8, 8\)"),
    ],
)
def test_a_broken_shard_is_refused(tmp_path, harm, file, verify, message):
    write_set(tmp_path)
    harm(getattr(shard_files(tmp_path, 0), file))
    with pytest.raises(ValueError, match=message):
        open_pairs(tmp_path, verify=verify)


def test_the_summary_comes_last(tmp_path, monkeypatch):
    writer = write_set(tmp_path, finish=())

    def fail_at_the_table(path, content):
        if path.suffix == ".parquet":
            raise OSError("disk full")
        path.write_bytes(content)

    monkeypatch.setattr(pair_shards, "write_atomically", fail_at_the_table)
    with pytest.raises(OSError, match="disk full"):
        writer.finish_shard(0, 2)
    monkeypatch.undo()
    assert writer.open_shards() == [0, 1]
    writer.finish_shard(0, 2)
    assert len(check_shard(tmp_path, 0, (STEPS, *SHAPE))) == 4
