"""Reading files of `torch.save`: tensors come back, everything else is one kind of error."""

from __future__ import annotations

import pickle

import pytest
import torch

from diffusers_ext.core.pickled_tensors import read_pickled_tensors


@pytest.mark.parametrize("mmap", [False, True])
def test_tensors_come_back(tmp_path, mmap):
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pt")
    assert read_pickled_tensors(tmp_path / "a.pt", mmap=mmap)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("content", [b"a photo", b"h\x07.", b"G12", b"Nb.", b"K\x01K\x02a."])
def test_bytes_that_are_no_pickle_are_one_kind_of_error(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises((pickle.UnpicklingError, EOFError)):
        read_pickled_tensors(tmp_path / "a.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.pt"):
        read_pickled_tensors(tmp_path / "a.pt")
