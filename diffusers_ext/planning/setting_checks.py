"""Rules that the settings of all runs share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers_ext.core.keywords import did_you_mean
from diffusers_ext.planning.work import WEIGHT_DTYPES


def check_counts(setting: Any, names: Iterable[str], least: int = 1) -> None:
    """Raise `ValueError` unless the named fields are at least `least`; `None` is left alone."""
    for name in names:
        value = getattr(setting, name)
        if value is not None and not value >= least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def check_precision(mixed_precision: str) -> None:
    """Raise `ValueError` unless accelerate has such a precision."""
    check_choice("mixed_precision", mixed_precision, WEIGHT_DTYPES)


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise `ValueError` unless a value is one of some."""
    known = list(choices)
    if value not in known:
        raise ValueError(
            f"`{name}` must be one of {known}, got {value!r}.{did_you_mean(str(value), map(str, known))}"
        )
