from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffusers_ext.core.tensor_files import config_digest
from diffusers_ext.golden_noise.pairs import shards as pair_shards
from diffusers_ext.golden_noise.pairs.dataset import PairDataset, open_pairs
from diffusers_ext.golden_noise.pairs.shards import PairWriter, check_shard, shard_files
from tests.golden_noise.pair_sets import SHAPE, STEPS, deltas_of, record, write_set


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


def test_parts_come_back_as_they_went(tmp_path):
    writer = write_set(tmp_path, finish=())
    part = writer.read_part(0, 0)
    assert torch.equal(part.deltas, deltas_of([0, 1, 2]).half())
    assert (part.pairs, part.rejected) == ([record(0), record(1), record(2)], [record(3)])
    assert writer.read_part(0, 2) is None
    with pytest.raises(ValueError, match=r"Shard 0 must have all its parts, got none for \[2\]"):
        writer.finish_shard(0, 3)
    (tmp_path / "pairs").mkdir()
    for name in ("pairs/.00000.parquet.abc", ".config.json.abc"):  # of a killed process
        (tmp_path / name).write_text("half")
    writer.clean_up()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["README.md", "config.json", "pairs"]


def test_a_shard_of_rejected_pairs_keeps_its_table(tmp_path):
    writer = PairWriter(tmp_path, SHAPE, STEPS, num_shards=1)
    writer.create()
    writer.write_part(0, 0, torch.zeros(0, STEPS, *SHAPE), [], [record(0)])
    writer.finish_shard(0, 1)
    assert pair_shards.read_table(shard_files(tmp_path, 0).rejected) == [record(0)]
    with pytest.raises(ValueError, match="must hold at least one pair, got none in 1 finished"):
        PairDataset(tmp_path)


def test_the_remedy_for_a_broken_shard_works(tmp_path):
    writer = write_set(tmp_path)
    path = shard_files(tmp_path, 0).tensors
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="Remove shards/00000.json"):
        writer.check()
    (tmp_path / "shards/00000.json").unlink()
    writer.check()
    assert writer.open_shards() == [0]
    assert len(open_pairs(tmp_path)) == 2


def test_two_sets_do_not_mix(tmp_path):
    writer = write_set(tmp_path)
    with pytest.raises(ValueError, match="must hold no pairs of an earlier run, got some in"):
        writer.create()
    other = PairWriter(tmp_path, SHAPE, 1, num_shards=3)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 8, 8\) in 3 shards, got \(2, 4, 8, 8\)"):
        other.check()


def test_parts_that_do_not_fit_are_refused(tmp_path):
    writer = PairWriter(tmp_path, SHAPE, STEPS, num_shards=1)
    with pytest.raises(ValueError, match=r"`deltas` must be \(1, 2, 4, 8, 8\), got \(2, 2, 4"):
        writer.write_part(0, 0, deltas_of([0, 1]), [record(0)])
    broken = deltas_of([0, 1])
    broken[1, 0, 0, 0, 0] = 70000.0  # beyond float16
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity for 'NA', seed"):
        writer.write_part(0, 0, broken, [record(0), record(1)])
    assert not (tmp_path / "progress").exists()


def test_the_config_is_plain_json(tmp_path):
    write_set(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("config_sha256") == config_digest(config)
    assert config == {
        "_class_name": "PairDataset",
        "format_version": 1,
        "num_steps": STEPS,
        "latent_shape": list(SHAPE),
        "num_shards": 2,
        "facts": {"w1": 5.5},
    }
