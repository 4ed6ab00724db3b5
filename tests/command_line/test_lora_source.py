from __future__ import annotations

import pytest

from diffusers_ext.command_line.lora_source import locate_lora


def test_files_and_folders(lora):
    file = lora / "pytorch_lora_weights.safetensors"
    assert locate_lora(str(file)) == locate_lora(str(lora)) == file
    assert locate_lora(str(lora), "pytorch_lora_weights.safetensors") == file


def test_what_is_not_there(lora, hub):
    with pytest.raises(ValueError, match="must hold x.safetensors, got none. Name it with"):
        locate_lora(str(lora), "x.safetensors")
    for source in ("./nowhere", "nowhere", "some/file.safetensors", "a/b/c", "a b/c", "../a"):
        with pytest.raises(
            ValueError, match=f"a folder or 'user/name', got {source}: no such file"
        ):
            locate_lora(source)
    assert not hub.requests
    with pytest.raises(OSError, match="tester/nowhere"):
        locate_lora("tester/nowhere")
