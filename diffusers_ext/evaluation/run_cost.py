"""Time and memory of the parts of a run, measured side by side while it goes on."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


try:
    import resource
except ImportError:  # Windows has no such module; resident memory is then not reported
    resource = None


class Measurement(NamedTuple):
    """One run of one part."""

    pictures: int
    seconds: float
    memory: int | None  # bytes, see `RunCost.peak_memory`


class RunCost:
    """Collects what the parts of a run cost.

    Args:
        device: on which they run; it is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.measurements: dict[str, list[Measurement]] = {}

    @contextmanager
    def measure(self, part: str, pictures: int) -> Iterator[None]:
        """Measure the block as one run of `part` over so many pictures."""
        self._synchronize()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        before, start = _peak_resident_bytes(), time.perf_counter()
        yield
        self._synchronize()
        seconds = time.perf_counter() - start
        if on_gpu:
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = None if before is None else _peak_resident_bytes() - before
        found = Measurement(pictures, seconds, memory)
        self.measurements.setdefault(part, []).append(found)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, part: str) -> float:
        """Seconds a picture: the median over full batches.

        The first batch, which warms up, counts only where there is no other full one.
        """
        found = self.measurements[part]
        full = max(measurement.pictures for measurement in found)
        counted = [m for m in found[1:] if m.pictures == full] or found
        return statistics.median(m.seconds / m.pictures for m in counted)

    def peak_memory(self, part: str) -> int | None:
        """On a GPU, the most bytes allocated while the part ran.

        Elsewhere, by how much the part raised the process's largest resident set: 0 where it needs
        no more than what ran before it.
        """
        found = [m.memory for m in self.measurements[part] if m.memory is not None]
        if not found:
            return None
        return max(found) if self.device.type == "cuda" else sum(found)


def _peak_resident_bytes() -> int | None:
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
