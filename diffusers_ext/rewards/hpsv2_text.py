"""Prompts as HPSv2 reads them: cleaned as open_clip does, then CLIP's byte-pair tokens."""

from __future__ import annotations

import html
import importlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch


def import_ftfy() -> ModuleType:
    """The package that repairs text; raises `ImportError` with the remedy where it is absent."""
    try:
        return importlib.import_module("ftfy")
    except ModuleNotFoundError as error:
        raise ImportError(
            "HPSv2 needs ftfy to read prompts as its authors did, and ftfy is not installed. "
            "Install it: pip install 'diffusers_ext[rewards]'."
        ) from error


def clean_prompt(prompt: str) -> str:
    """Repair mojibake, unescape HTML twice, join white space, lower the case.

    CLIP tokenizers of transformers do only the last two, so they give other tokens for curly
    quotes, HTML entities and full-width letters.
    """
    text = html.unescape(html.unescape(import_ftfy().fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip().lower()


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int = 77) -> torch.Tensor:
    """Tokens of cleaned prompts: start, at most `length - 2` of text, end, then zeros; int64."""
    cleaned = [clean_prompt(prompt) for prompt in prompts]
    ids = torch.zeros(len(cleaned), length, dtype=torch.long)
    for row, text in zip(ids, cleaned, strict=True):
        tokens = tokenizer(text, truncation=True, max_length=length).input_ids
        row[: len(tokens)] = torch.tensor(tokens)
    return ids
