"""Compare two pieces of work on a machine whose speed drifts: in turn, pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Ratio(NamedTuple):
    """How long `first` takes in terms of `second`."""

    median: float
    lowest: float
    highest: float
    first_seconds: float  # median
    second_seconds: float  # median


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Wall time of one call, the GPU's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began


def compare(
    first: Callable[[], object],
    second: Callable[[], object],
    pairs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Time both `pairs` times after one warm-up each; the order alternates from pair to pair.

    On cores that others use, too, `clock` may be `time.process_time`, of work that runs on one thread.
    """
    seconds(first, clock)
    seconds(second, clock)
    times = []
    for index in range(pairs):
        if index % 2:
            other = seconds(second, clock)
            times.append((seconds(first, clock), other))
        else:
            times.append((seconds(first, clock), seconds(second, clock)))
    ratios = [a / b for a, b in times]
    return Ratio(
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
    )
