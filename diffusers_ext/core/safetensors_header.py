"""Equal safetensors files as equal bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from diffusers_ext.core.artifacts import write_atomically


def sort_metadata(path: str | os.PathLike) -> None:
    """Rewrite a safetensors file with its metadata in order of name."""
    write_atomically(path, with_sorted_metadata(Path(path).read_bytes()))


def with_sorted_metadata(content: bytes) -> bytes:
    """The bytes of a safetensors file with its metadata in order of name.

    The library writes more than one entry in an order that differs from run to run. A file is the
    length of its header in 8 bytes, the header as JSON, padded with spaces, and the tensors
    (https://github.com/huggingface/safetensors, "Format").
    """
    header = json.loads(content[8 : tensors_offset(content)])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[tensors_offset(content) :]


def tensors_offset(content: bytes) -> int:
    """Where in the bytes of a safetensors file the tensors begin."""
    return 8 + int.from_bytes(content[:8], "little")
