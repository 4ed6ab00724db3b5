"""A set is hashed once: what has not changed since is not read again."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest

from diffusers_ext.golden_noise.pairs import shards as pair_shards
from diffusers_ext.golden_noise.pairs import verified
from diffusers_ext.golden_noise.pairs.dataset import open_pairs
from diffusers_ext.golden_noise.pairs.shards import shard_files
from diffusers_ext.golden_noise.pairs.verified import RECORD_NAME, VerifiedFiles
from tests.golden_noise.pair_sets import write_set


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that are hashed from here on."""
    names: list[str] = []
    digest = pair_shards.file_sha256
    monkeypatch.setattr(pair_shards, "file_sha256", lambda path: (names.append(Path(path).name), digest(path))[1])
    monkeypatch.setattr(verified, "_SETTLED_NS", -(10**18))  # as if the set were old
    return names


def test_a_set_is_hashed_once(tmp_path, hashed, caplog):
    caplog.set_level(logging.INFO)
    write_set(tmp_path)
    open_pairs(tmp_path)
    assert len(hashed) == 6
    assert "Hashed 6 files of" in caplog.text
    caplog.clear()
    open_pairs(tmp_path)
    assert len(hashed) == 6
    assert not caplog.records


@pytest.mark.parametrize("same_size", [True, False])
def test_a_changed_file_is_hashed_again_and_refused(tmp_path, hashed, same_size):
    write_set(tmp_path)
    open_pairs(tmp_path)
    hashed.clear()
    path = shard_files(tmp_path, 0).tensors
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-3] ^= 1
    time.sleep(0.02)  # past the grain of the clock
    path.write_bytes(content if same_size else content[:-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # who hides a change still leaves the other time
    with pytest.raises(ValueError, match="must have SHA-256 .*: it is truncated or was altered"):
        open_pairs(tmp_path)
    assert hashed == [path.name]


def test_a_copy_is_hashed_again(tmp_path, hashed):
    write_set(tmp_path / "set")
    open_pairs(tmp_path / "set")
    hashed.clear()
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    open_pairs(tmp_path / "copy")
    assert len(hashed) == 6


def test_files_of_this_moment_are_not_kept(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(verified, "_SETTLED_NS", 2 * 10**9)
    write_set(tmp_path)
    for count in (6, 12):
        open_pairs(tmp_path)
        assert len(hashed) == count
    assert not (tmp_path / RECORD_NAME).exists()


def test_without_a_check_nothing_is_hashed(tmp_path, hashed):
    write_set(tmp_path)
    open_pairs(tmp_path, verify=False)
    assert not hashed
    assert not (tmp_path / RECORD_NAME).exists()


@pytest.mark.parametrize("content", ["", "[]", '{"files": []}', '{"files": {"pairs/00000.parquet": 1}}'])
def test_a_broken_record_is_none(tmp_path, hashed, content):
    write_set(tmp_path)
    open_pairs(tmp_path)
    hashed.clear()
    (tmp_path / RECORD_NAME).write_text(content)
    open_pairs(tmp_path)
    assert len(hashed) == 6
    assert len(json.loads((tmp_path / RECORD_NAME).read_text())["files"]) == 6


def test_a_folder_that_cannot_be_written_to(tmp_path, hashed, monkeypatch, caplog):
    write_set(tmp_path)

    def refuse(path, content):
        raise OSError("read-only")

    monkeypatch.setattr(verified, "write_atomically", refuse)
    open_pairs(tmp_path)
    assert "keeps no record of its checksums (read-only): the next start hashes again" in caplog.text


def test_another_checksum_is_not_held(tmp_path, hashed):
    write_set(tmp_path)
    open_pairs(tmp_path)
    name = "pairs/00000.parquet"
    sha256 = json.loads((tmp_path / RECORD_NAME).read_text())["files"][name]["sha256"]
    assert VerifiedFiles(tmp_path).holds(name, sha256)
    assert not VerifiedFiles(tmp_path).holds(name, "0" * 64)
