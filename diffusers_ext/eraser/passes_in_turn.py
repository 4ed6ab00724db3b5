"""Several passes with gradient of which one at a time holds its activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch.utils.checkpoint import checkpoint


Result = TypeVar("Result")


def run_in_turn(passes: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run passes so that one backward over all their results takes the memory of one of them.

    All but the last are computed again in the backward pass, which costs one more forward of each.
    The last keeps its activations: autograd goes backward from what was computed last, and has
    freed them when it comes to the others. Gradient checkpointing of blocks works inside as well.

    Args:
        passes: functions without arguments that compute the same whenever they are called; they see
            the random numbers and the autocast of the first call again.

    Returns:
        What each gives, in their order.
    """
    results = [checkpoint(run, use_reentrant=False) for run in passes[:-1]]
    return results + [run() for run in passes[-1:]]
