"""Rules for values on the command line, checked before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def check_values(
    args: argparse.Namespace, names: Sequence[str], rule: str, holds: Callable[[Any], bool]
) -> None:
    """Raise `ValueError` where a given argument breaks a rule; `None` is not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise ValueError(f"`{name}` must be {rule}, got {value}.")


def check_drawing_arguments(args: argparse.Namespace, counts: Sequence[str]) -> None:
    """Raise `ValueError` for a wrong output folder, seed, or number of something."""
    check_values(args, counts, "at least 1", lambda value: value >= 1)
    check_values(args, ["output_dir"], "a folder", lambda value: not Path(value).is_file())
    check_values(args, ["seed"], "from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
