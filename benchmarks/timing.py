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


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, the GPU's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(first: Callable[[], object], second: Callable[[], object], pairs: int) -> Ratio:
    """Time both `pairs` times after one warm-up each; the order alternates from pair to pair."""
    seconds(first)
    seconds(second)
    times = []
    for index in range(pairs):
        if index % 2:
            other = seconds(second)
            times.append((seconds(first), other))
        else:
            times.append((seconds(first), seconds(second)))
    ratios = [a / b for a, b in times]
    return Ratio(
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
    )
