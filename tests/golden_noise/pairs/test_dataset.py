from __future__ import annotations

import logging
import pickle

import pytest
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader

from diffusers_ext.golden_noise.pairs import shards as pair_shards
from diffusers_ext.golden_noise.pairs.dataset import PairDataset, open_pairs, source_noise
from diffusers_ext.golden_noise.pairs.shards import PairRecord, PairWriter
from tests.golden_noise.pair_sets import SHAPE, STEPS, deltas_of, record, write_set


def test_items_are_what_was_written(tmp_path):
    writer = write_set(tmp_path)
    assert writer.open_shards() == []
    assert not (tmp_path / "progress/00000").exists()
    pairs = open_pairs(tmp_path)
    assert isinstance(pairs, PairDataset)
    assert (len(pairs), pairs.num_steps, pairs.latent_shape) == (6, STEPS, SHAPE)
    assert pairs.facts == {"w1": 5.5}
    assert pairs.complete
    assert pairs.records == [record(index) for index in (0, 1, 2, 5, 6, 7)]
    assert pairs.prompts == [record(index).prompt for index in (0, 1, 2, 5, 6, 7)]
    item = pairs[4]
    assert item["prompt"] == record(6).prompt
    generator = torch.Generator().manual_seed(2**62 + 6)
    assert torch.equal(item["noise"], torch.randn(SHAPE, generator=generator))
    expected = item["noise"] + deltas_of([6, 7])[0].half().float()
    assert item["golden"].dtype == torch.float32
    assert torch.equal(item["golden"], expected)
    assert torch.equal(pairs[-2]["golden"], expected)
    with pytest.raises(IndexError):
        pairs[6]


def test_workers_read_the_same_items(tmp_path):
    write_set(tmp_path)
    pairs = PairDataset(tmp_path)
    first = pairs[0]  # the file is mapped now
    copy = pickle.loads(pickle.dumps(pairs))
    assert torch.equal(copy[0]["golden"], first["golden"])
    loader = DataLoader(pairs, batch_size=4, num_workers=1)
    batches = list(loader)
    assert [len(batch["prompt"]) for batch in batches] == [4, 2]
    golden = torch.cat([batch["golden"] for batch in batches])
    assert torch.equal(golden, torch.stack([item["golden"] for item in pairs]))


def test_opening_reads_no_tensor(tmp_path, monkeypatch):
    write_set(tmp_path)
    read = []
    monkeypatch.setattr(
        "diffusers_ext.golden_noise.pairs.dataset.open_deltas",
        lambda path: read.append(path.stem) or pair_shards.open_deltas(path),
    )
    pairs = PairDataset(tmp_path)
    assert read == []
    pairs[5], pairs[4]
    assert read == ["00001"]


@pytest.mark.parametrize("by_name", [True, False])
def test_datasets_reads_the_tables(tmp_path, by_name):
    write_set(tmp_path / "set")
    cache = str(tmp_path / "cache")
    for name, indices in (("pairs", (0, 1, 2, 5, 6, 7)), ("rejected", (3, 4))):
        files = str(tmp_path / "set" / name / "*.parquet")
        source = (str(tmp_path / "set"), name) if by_name else ("parquet",)
        data_files = {} if by_name else {"data_files": files}
        table = load_dataset(*source, split="train", cache_dir=cache, **data_files)
        assert [PairRecord(**row) for row in table] == [record(index) for index in indices]


def test_an_unfinished_set_can_be_read_and_says_so(tmp_path, caplog):
    writer = write_set(tmp_path, finish=(1,))
    assert writer.open_shards() == [0]
    with caplog.at_level(logging.WARNING):
        pairs = PairDataset(tmp_path)
    assert "holds 1 of 2 shards: its generation has not ended" in caplog.text
    assert not pairs.complete
    assert [r.index for r in pairs.records] == [6, 7]


def test_a_set_without_a_filter_has_an_empty_table(tmp_path):
    writer = PairWriter(tmp_path / "set", SHAPE, STEPS, num_shards=1)
    writer.create()
    writer.write_part(0, 0, deltas_of([0]), [record(0)._replace(reward_golden=None)])
    writer.finish_shard(0, 1)
    assert open_pairs(tmp_path / "set").records[0].reward_golden is None
    cache = str(tmp_path / "cache")
    assert len(load_dataset(str(tmp_path / "set"), split="train", cache_dir=cache)) == 1


def test_folders_that_are_no_sets(tmp_path):
    with pytest.raises(ValueError, match="must be a folder or Hub name of noise pairs, got .*no: no "):
        open_pairs(tmp_path / "no")
    with pytest.raises(ValueError, match="got none of config.json, metadata.csv and"):
        open_pairs(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must hold JSON, got: "):
        open_pairs(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "NPNet"}')
    with pytest.raises(ValueError, match="must describe a PairDataset, got 'NPNet'"):
        open_pairs(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "PairDataset", "format_version": 2}')
    with pytest.raises(ValueError, match="`format_version` must be at most 1, got 2"):
        open_pairs(tmp_path)


def test_noise_comes_from_its_seed_alone():
    noise = source_noise(3, (1, 2, 8))
    torch.testing.assert_close(noise[0, 0, :4], torch.tensor([-0.0766, 0.3599, -0.7820, 0.0715]), atol=1e-4, rtol=0)
    torch.manual_seed(7)
    assert torch.equal(noise, source_noise(3, [1, 2, 8]))
    assert not torch.equal(noise, source_noise(4, (1, 2, 8)))
