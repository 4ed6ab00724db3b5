"""Equal safetensors files as equal bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from diffusers_ext.core.artifacts import write_atomically


def sort_metadata(path: str | os.PathLike) -> None:
    """Rewrite a safetensors file with its metadata in order of name.

    The library writes more than one entry in an order that differs from run to run. A file is the
    length of its header in 8 bytes, the header as JSON, padded with spaces, and the tensors
    (https://github.com/huggingface/safetensors, "Format").
    """
    content = Path(path).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write_atomically(path, len(text).to_bytes(8, "little") + text + content[end:])
