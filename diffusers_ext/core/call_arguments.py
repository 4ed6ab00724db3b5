"""Checks of what a call is given."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """A number of a call; `TypeError` for what is none, `ValueError` unless it is finite and in `[least, most]`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got a {type(value).__name__}.")
    if not (math.isfinite(value) and least <= value <= most):
        within = f" and in [{least:g}, {most:g}]" if math.isfinite(most) else f" and at least {least:g}"
        raise ValueError(f"`{name}` must be finite{within if math.isfinite(least) else ''}, got {value}.")
    return value
