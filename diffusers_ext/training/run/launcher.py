"""What whoever starts several processes tells each of them, known before any library that reads it, too."""

from __future__ import annotations

import os
from collections.abc import Sequence

# torchrun and accelerate by the first names, MPI's launchers by the others.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def process_rank() -> int:
    """The number of this process among those of its launcher; 0 where there is none."""
    return _number(_RANKS, 0)


def process_count() -> int:
    """How many processes its launcher has started; 1 where there is none."""
    return _number(_COUNTS, 1)


def _number(names: Sequence[str], otherwise: int) -> int:
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdecimal()), otherwise)
