"""Rules for values on the command line, checked before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def check_values(
    args: argparse.Namespace, names: Sequence[str], rule: str, holds: Callable[[Any], bool]
) -> None:
    """Raise `ValueError` where a given argument breaks a rule; `None` is not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise ValueError(f"`{name}` must be {rule}, got {value}.")
