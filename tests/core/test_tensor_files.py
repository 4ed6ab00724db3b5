"""The reader of safetensors files, on files as a stranger could have made them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from diffusers_ext.core.tensor_files import (
    DIGEST_KEY,
    FLOATING,
    check_finite,
    check_tensors,
    open_tensors,
    read_tensors,
    with_digest,
)


def file_of(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file put together by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(*shape: int, dtype: str = "F32", size: int = 4) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


def test_tensors_and_metadata_come_back(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4), "c": torch.zeros(0)}
    save_file(tensors, tmp_path / "w.safetensors", {"x": "y"})
    found, metadata = read_tensors(tmp_path / "w.safetensors")
    expected = {"a": (2, 3), "b": torch.empty(4, dtype=torch.int64), "c": torch.empty(0, device="meta")}
    check_tensors(found, tmp_path / "w.safetensors", expected=expected)
    assert metadata == {"x": "y"}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert read_tensors(file_of(tmp_path / "e.safetensors", {})) == ({}, {})


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"a": entry(1)}, b"0000", 10**10),
        ({"a": entry(1)}, b"0000", 2**64 - 1),
        ({"a": entry(100, size=400)}, b"0000", None),
        ({"a": entry(1)}, b"00000000", None),
        ({"a": entry(2)}, b"0000", None),
        ({"a": entry(-1)}, b"0000", None),
        ({"a": entry(2**40, 2**40)}, b"0000", None),
        ({"a": entry(1, dtype="F31")}, b"0000", None),
        ({"a": entry(1), "b": entry(1)}, b"0000", None),
        ({"a": entry(1), "__metadata__": {"a": 1}}, b"0000", None),
        (b'{"a":' + b"[" * 100_000, b"", None),
        (b"\xff\xfe{}", b"", None),
        (b"", b"", None),
    ],
)
def test_files_that_do_not_fit_themselves_are_refused(tmp_path, header, data, length):
    path = file_of(tmp_path / "w.safetensors", header, data, length)
    with pytest.raises(ValueError, match=r"w\.safetensors must be a whole safetensors file.*again"):
        read_tensors(path)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "empty").touch()
    for name, found in {
        "pipe": "a pipe", "loop": "symbolic links", ".": "a folder", "gone": "No such file",
        "empty": "header of 0 bytes in a file of 0", "null\0": "null",
    }.items():  # fmt: skip
        for read in (read_tensors, open_tensors):
            with pytest.raises(ValueError, match=r"must be a .*file, got") as error:
                read(tmp_path / name)
            assert found in str(error.value)
            assert str(tmp_path) in str(error.value)


def test_missing_surplus_and_other_tensors_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(1)}, path)
    for expected, message in [
        ({"a": (2, 3), "c": (1,)}, "1 missing: 'c', and 1 that are not expected: 'b'"),
        ({"a": (3, 2), "b": (1,)}, r"'a' of shape \(3, 2\), got \(2, 3\)"),
        ({"a": torch.ones(2, 3).half(), "b": (1,)}, "'a' in float16, got float32"),
    ]:
        with pytest.raises(ValueError, match=rf"w\.safetensors must hold .*{message}"):
            check_tensors(read_tensors(path)[0], path, expected=expected)
    save_file({"a": torch.ones(2, 3, dtype=torch.int32)}, path)
    with pytest.raises(ValueError, match=r"w\.safetensors must hold 'a' in float16 or .*got int32"):
        read_tensors(path, dtypes=FLOATING)


@pytest.mark.parametrize(
    "dtype", [*FLOATING, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.float8_e8m0fnu]
)  # fmt: skip
def test_numbers_that_are_none_are_refused(tmp_path, dtype):
    path = tmp_path / "w.safetensors"
    save_file({"good": torch.ones(3).to(dtype), "bad": torch.tensor([1, float("nan")]).to(dtype)}, path)
    with pytest.raises(ValueError, match=r"w\.safetensors must hold finite numbers, .* 'bad'"):
        read_tensors(path)
    assert read_tensors(path, finite=False)[0]["good"].dtype == dtype


def test_integers_and_numbers_of_four_bits_hold_no_infinity():
    check_finite(torch.arange(4), "a", "w")
    check_finite(torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "a", "w")


def test_a_digest_finds_every_change(tmp_path):
    tensors = {"a": torch.arange(6.0), "b": torch.arange(6.0) + 6, "c": torch.zeros(0)}
    path = tmp_path / "w.safetensors"
    metadata = with_digest(tensors, {"alpha": "4"})
    save_file(tensors, path, metadata)
    assert read_tensors(path)[1] == metadata
    swapped = {"a": tensors["b"], "b": tensors["a"], "c": tensors["c"]}
    other_dtype = tensors | {"a": tensors["a"].view(torch.int32)}
    for changed, kept in (
        (swapped, metadata), (other_dtype, metadata), (tensors | {"a": tensors["a"] + 1e-6}, metadata),
        (tensors, metadata | {"alpha": "8"}), (tensors, metadata | {DIGEST_KEY: ""}),
        (tensors | {"c": torch.zeros(0, 2)}, metadata),
    ):  # fmt: skip
        path.write_bytes(save(changed, kept))
        with pytest.raises(ValueError, match=r"w\.safetensors must have the contents"):
            read_tensors(path)
