"""Recognise the text that Hugging Face libraries write into a README.md when nobody does."""

from __future__ import annotations

import re
from functools import cache

from huggingface_hub import ModelCard, ModelCardData


# Lines of the templates of diffusers and PEFT, and of earlier versions of this package.
_LINES = re.compile(
    r"This is the model card of a \W+ (diffusers|transformers) .*automatically generated\.?"
    r"|<!-- This model card has been generated automatically .*"
    r"|should probably proofread and complete it, then remove this comment\. -->"
    r"|## Intended uses & limitations|#### How to use|#### Limitations and bias"
    r"|## Training details|```(python)?|# TODO: add an example code snippet .*"
    r"|\[TODO: .*\]"
    r"|## Training procedure|### Framework versions|- PEFT \d\S*"
    r"|Noise pairs: `diffusers_ext\S*open_pairs` reads the noises, `datasets` the tables\."
)


def is_automatic(body: str) -> bool:
    """Whether every line of a card's text is one that a library wrote; true of an empty text."""
    lines = {line.strip() for line in body.splitlines()} - {""}
    return all(line in _template_lines() or _LINES.fullmatch(line) for line in lines)


@cache
def _template_lines() -> frozenset[str]:
    text = ModelCard.from_template(ModelCardData()).text
    return frozenset(line.strip() for line in text.splitlines())
