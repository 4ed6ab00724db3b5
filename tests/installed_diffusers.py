"""What an older diffusers lacks, by a part of the names of tests."""

from __future__ import annotations

from importlib.metadata import version

import torch

INSTALLED = tuple(map(int, version("diffusers").split(".")[:2]))
_NEEDED = {"z_image": (0, 39), "StableDiffusion3AutoBlocks": (0, 39)}
if not torch.accelerator.is_available():  # which was asked for its kind, whether there was one or not
    _NEEDED |= dict.fromkeys(("group_offload", "rehearsed[offload"), (0, 41))


def lacking(name: str) -> str | None:
    """Why a test, a class or a family of this name cannot be had, `None` where it can."""
    for words, needed in _NEEDED.items():
        if words in name and needed > INSTALLED:
            return f"{words} needs diffusers {needed[0]}.{needed[1]}"
    return None
