from __future__ import annotations

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from diffusers_ext.core.artifacts import sealed, with_sorted_metadata


TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2], dtype=torch.int8)}
METADATA = {f"key {i}": f'värde "{i}" {{}}\n' for i in range(12)}


def test_equal_files_are_equal_bytes():
    contents = set()
    for _ in range(4):
        contents.add(sealed(TENSORS, METADATA))
    assert len(contents) == 1
    header = contents.pop()
    assert [header.index(key.encode()) for key in sorted(METADATA)] == sorted(
        header.index(key.encode()) for key in METADATA
    )


def test_nothing_is_lost(tmp_path):
    path = tmp_path / "file.safetensors"
    for metadata in (METADATA, None):
        path.write_bytes(with_sorted_metadata(save(TENSORS, metadata=metadata)))
        loaded = load_file(path)
        assert loaded.keys() == TENSORS.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
        with safe_open(path, "pt") as handle:
            assert (handle.metadata() or {}) == (metadata or {})
