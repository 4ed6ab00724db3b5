"""Reading files of `torch.save`: tensors come back, everything else is one kind of error."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch

from diffusers_ext.core.tensor_files import read_pickled_tensors


@pytest.mark.parametrize("mmap", [False, True])
def test_tensors_come_back(tmp_path, mmap):
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pt")
    assert read_pickled_tensors(tmp_path / "a.pt", mmap=mmap)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "content", [b"", b"a photo", b"h\x07.", b"G12", b"Nb.", b"K\x01K\x02a.", b"PK\x03\x04", b"(" * 99]
)
def test_bytes_that_are_no_pickle_are_one_kind_of_error(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt must"):
        read_pickled_tensors(tmp_path / "a.pt")


def test_no_code_of_a_pickle_runs(tmp_path):
    class Runs:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "it_ran",)

    torch.save({"a": torch.ones(1), "b": Runs()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt must hold nothing but tensors"):
        read_pickled_tensors(tmp_path / "a.pt")
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize(
    "tree",
    [
        {"a": [torch.ones(2), torch.tensor([1, float("nan")])]},
        (torch.full((3,), float("inf"), dtype=torch.bfloat16),),
        {1: {2: torch.full((3,), float("nan"), dtype=torch.float8_e4m3fn)}},
    ],
)
def test_numbers_that_are_none_are_refused_at_any_depth(tmp_path, tree):
    torch.save(tree, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt must hold finite numbers"):
        read_pickled_tensors(tmp_path / "a.pt")
    read_pickled_tensors(tmp_path / "a.pt", finite=False)


def test_four_bytes_are_not_a_terabyte(tmp_path):
    torch.save({"a": torch.ones(1).expand(2**20, 2**18)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt must hold its tensors as they are"):
        read_pickled_tensors(tmp_path / "a.pt")


def test_a_zip_file_that_unpacks_to_more_is_refused(tmp_path):
    torch.save({"a": torch.zeros(200_000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(name, content)
    with pytest.raises(ValueError, match=r"b\.pt must hold its tensors as they are, got a zip"):
        read_pickled_tensors(tmp_path / "b.pt")


def test_sparse_tensors_are_refused(tmp_path):
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt must"):
        read_pickled_tensors(tmp_path / "a.pt")


def test_shared_weights_and_slices_are_no_more_than_the_file(tmp_path):
    whole = torch.randn(1000)
    torch.save({"a": whole, "b": whole, "rows": list(whole.view(10, 100))}, tmp_path / "a.pt")
    assert len(read_pickled_tensors(tmp_path / "a.pt")["rows"]) == 10


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    for name, found in (("pipe", "a pipe"), ("loop", "symbolic links"), ("gone", "No such file")):
        with pytest.raises(ValueError, match=rf"{name}\.pt must be a file, got: .*|a file, got") as e:
            read_pickled_tensors(tmp_path / f"{name}.pt")
        assert found in str(e.value)
