"""What the installed versions of the libraries lack, for tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import pytest
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


def in_its_words(code: str) -> str:
    """Code of a page or a card, with the name that diffusers below 0.40 has for `dtype`: docs/compatibility.md."""
    return re.sub(r"(?<=[ (])dtype=(?=torch\.)", "torch_dtype=", code) if INSTALLED < (0, 40) else code


@contextmanager
def what_transformers_lets_peft_do() -> Iterator[None]:
    """Skip tests of text encoders' LoRAs where transformers, as from 5.24 on, asks for a newer peft than there is."""
    try:
        yield
    except ValueError as error:
        from transformers.integrations.peft import MIN_PEFT_VERSION

        installed, asked = (tuple(map(int, text.split(".")[:2])) for text in (version("peft"), MIN_PEFT_VERSION))
        if installed >= asked or "The version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(f"LoRAs of text encoders need peft {MIN_PEFT_VERSION} here")
