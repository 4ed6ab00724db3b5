"""What a LoRA file must be before anything is made of it: pairs that fit, finite, and with an effect."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from diffusers_ext.core.checked_tensors import FLOATING, check_tensors


_REMEDY = "Download or train it again."
_DIMENSIONS = range(2, 6)  # of a Linear's weight to a 3-D convolution's
# PEFT takes keys of these settings as regular expressions. One with repetitions of its own could
# keep a loader busy for ever; names, an anchor and one leading `.*` are what PEFT itself writes.
_SAFE_PATTERN = re.compile(r"\^?(\.\*)?(\\?[\w.\-])*\$?")
_PATTERNS = ("alpha_pattern", "rank_pattern")
_NUMBERS = ("lora_alpha", "r")


def adapter_settings(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """The settings of PEFT's adapters that diffusers keeps in a file's metadata, checked."""
    text = metadata.get(LORA_ADAPTER_METADATA_KEY)
    if not text:
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} must hold JSON as {LORA_ADAPTER_METADATA_KEY!r} of its metadata, got: {error}. "
            f"{_REMEDY}"
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{where} must hold a JSON object as {LORA_ADAPTER_METADATA_KEY!r} of its metadata, got a "
            f"{type(settings).__name__}. {_REMEDY}"
        )
    for name, value in settings.items():
        kind = name.rpartition(".")[2]
        if kind in _NUMBERS:
            _check_number(name, value, where)
        elif kind in _PATTERNS and value:
            if not isinstance(value, dict):
                raise ValueError(f"{where} must hold names and numbers as {name!r}, got {value!r}.")
            for pattern, number in value.items():
                if not _SAFE_PATTERN.fullmatch(pattern):
                    raise ValueError(
                        f"{where} must hold module names in {name!r}, got the pattern {pattern!r}. "
                        f"{_REMEDY}"
                    )
                _check_number(name, number, where)
    return settings


def _check_number(name: str, value: Any, where: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"{where} must hold a finite number as {name!r}, got {value!r}. {_REMEDY}")


def check_pair(name: str, parts: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise `ValueError` unless A, B and alpha of one module fit each other.

    Args:
        parts: `{"A": (rank, in, ...), "B": (out, rank, ...)}`, and `"alpha"` where there is one.
    """
    if "A" not in parts or "B" not in parts:
        raise ValueError(
            f"{where}: every module of a LoRA must have A and B, got {sorted(parts)} for {name!r}. "
            f"{_REMEDY}"
        )
    tensors = {f"{name}.{part}": tensor for part, tensor in parts.items()}
    weights = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    check_tensors(weights, where, dtypes=FLOATING, remedy=_REMEDY)
    check_tensors(tensors, where, remedy=_REMEDY)
    a, b = parts["A"], parts["B"]
    shapes = f"A of shape {tuple(a.shape)} and B of shape {tuple(b.shape)} for {name!r}"
    if a.ndim not in _DIMENSIONS or b.ndim != a.ndim:
        raise ValueError(
            f"{where}: A and B of a LoRA must both be of a Linear (2 dimensions) or both of a "
            f"convolution (4), got {shapes}. {_REMEDY}"
        )
    if not a.numel() or not b.numel() or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{where}: A and B of a LoRA must have one rank, A `(rank, in)` and B `(out, rank)`, got "
            f"{shapes}. {_REMEDY}"
        )
    if any(side != 1 for side in b.shape[2:]):
        raise ValueError(
            f"{where}: B of a convolution's LoRA must be 1 x 1, got {shapes}. {_REMEDY}"
        )
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise ValueError(
            f"{where}: alpha must be one number, got {parts['alpha'].numel()} for {name!r}. {_REMEDY}"
        )


def check_rank(name: str, rank: int, expected: float, where: str) -> None:
    """Raise `ValueError` for a rank other than the one in the file's own metadata."""
    if rank != expected:
        raise ValueError(
            f"{where}: the rank of {name!r} must be {expected} as in the file's metadata, got {rank}. "
            f"{_REMEDY}"
        )


def check_lora_effect(lora: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError` if every update `B A` of a LoRA is zero."""
    for key, a in lora.items():
        if key.endswith(".lora_A.weight"):
            b = lora[key.replace(".lora_A.", ".lora_B.")]
            if a.any() and b.any():
                return
    raise ValueError("A LoRA must have an effect, got zero in every update. Was it trained?")
