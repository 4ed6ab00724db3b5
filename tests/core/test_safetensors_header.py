from __future__ import annotations

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_ext.core.artifacts import sort_metadata


TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2], dtype=torch.int8)}
METADATA = {f"key {i}": f'värde "{i}" {{}}\n' for i in range(12)}


def test_equal_files_become_equal_bytes(tmp_path):
    contents = set()
    for index in range(4):
        path = tmp_path / f"{index}.safetensors"
        save_file(TENSORS, path, metadata=METADATA)
        sort_metadata(path)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    header = contents.pop()
    assert [header.index(key.encode()) for key in sorted(METADATA)] == sorted(
        header.index(key.encode()) for key in METADATA
    )


def test_nothing_is_lost(tmp_path):
    path = tmp_path / "file.safetensors"
    for metadata in (METADATA, None):
        save_file(TENSORS, path, metadata=metadata)
        sort_metadata(path)
        loaded = load_file(path)
        assert loaded.keys() == TENSORS.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
        with safe_open(path, "pt") as handle:
            assert (handle.metadata() or {}) == (metadata or {})
    assert [found.name for found in tmp_path.iterdir()] == ["file.safetensors"]
