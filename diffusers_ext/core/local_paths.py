"""Keep paths of this machine, and with them the user's name, out of what is uploaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers_ext.core.base_model import public_name
from diffusers_ext.core.config_digest import CONFIG_DIGEST, config_digest


# Files in which the libraries and the training scripts note where something came from.
_ENDINGS = ("config.json", "model_index.json", "report.json")
_PIPELINE_INDEX = "model_index.json"


def public_content(path: Path) -> bytes | None:
    """A file as others may read it, where that differs from the file; `None` where it does not.

    Strings that are absolute paths of this machine become what `public_name` makes of them; of a
    component of a pipeline, the name of the pipeline. All other characters stay, but for the checksum
    of its own contents that a config may hold: it fits again.

    Args:
        path: of a file; only configs and reports in JSON are looked into.
    """
    if not path.name.endswith(_ENDINGS):
        return None
    original = path.read_bytes()
    try:
        text = original.decode()
        content = json.loads(text)
        found = sorted({value for value in _strings(content) if _is_local_path(value)})
    except (ValueError, RecursionError):  # neither ours nor of a library
        return None
    for value in found:
        for ascii_only in (True, False):
            written = json.dumps(value, ensure_ascii=ascii_only)
            text = text.replace(written, json.dumps(_public(Path(value)), ensure_ascii=ascii_only))
    if not found:
        return None
    digest = content.get(CONFIG_DIGEST) if isinstance(content, dict) else None
    if digest is not None and digest == config_digest(content):
        text = text.replace(f'"{digest}"', f'"{config_digest(json.loads(text))}"')
    return text.encode()


def _public(path: Path) -> str:
    of_pipeline = (path.parent / _PIPELINE_INDEX).is_file()
    return public_name(path.parent if of_pipeline else path)


def _is_local_path(value: str) -> bool:
    """Whether a string is an absolute path; a prompt such as "/imagine a fox" is none."""
    path = Path(value)
    # The first folder must exist; the rest may be gone by now.
    return path.is_absolute() and len(path.parts) > 2 and os.path.isdir(Path(*path.parts[:2]))


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, (dict, list)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _strings(item)
