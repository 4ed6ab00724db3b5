"""The device that is measured, and the rows that a part tells of it: all that differs between GPU and CPU is here."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.machine import describe_machine
from benchmarks.measured_memory import peak_bytes
from benchmarks.timing import Ratio, seconds

Row = dict[str, Any]
WEIGHTS = "for weights alone"


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Place(NamedTuple):
    """Where a part is measured, and who is told.

    Attributes:
        toy: of tiny models, for a rehearsal.
        tell: takes a row as soon as it is known.
    """

    device: torch.device
    toy: bool
    tell: Callable[[Row], None]

    @property
    def on_gpu(self) -> bool:
        """Whether this is no rehearsal on a CPU."""
        return self.device.type == "cuda"

    @property
    def as_on_gpu(self) -> bool:
        """Whether plans are made for a GPU."""
        return self.on_gpu or not self.toy

    def repeats(self, count: int) -> int:
        """So many on the real sizes, one in a rehearsal."""
        return 1 if self.toy else count

    def allocated(self) -> int | None:
        """Bytes of all tensors on the GPU; a CPU does not count them."""
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else None

    def free(self) -> None:
        """Give back what nobody holds any more; of a CPU, which tiny models do not fill, it is left to Python."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def within_memory(self, what: str, work: Callable[[], None], needs: int, of: str = "by plan") -> bool:
        """Do it; where the GPU is too small, tell that and go on. Returns whether it was done.

        `needs` bytes are what it takes, by the plan or its weights alone; with less than that free nothing is begun.
        """
        needed = f"needs {needs / 2**30:.1f} GiB {of}"
        free = torch.cuda.mem_get_info(self.device)[0] if self.on_gpu else needs
        if needs > free:
            self.tell({"what": what, "note": f"not begun: {needed}, {free / 2**30:.1f} GiB are free"})
            return False
        try:
            work()
        except torch.OutOfMemoryError:
            self.tell({"what": what, "note": f"more memory than there is: {needed}"})
            return False
        finally:
            self.free()
        return True

    def tell_ratio(self, what: str, ratio: Ratio, beside: str) -> None:
        """Of two times, taken pair by pair."""
        self.tell(
            {"what": what, "unit": "s", "measured": ratio.first_seconds, "beside": ratio.second_seconds}
            | {"of": beside, "ratio": ratio.median, "range": [ratio.lowest, ratio.highest]}
        )

    def tell_time(self, what: str, time: float, beside: float | None = None, of: str = "") -> None:
        """Of one time, or of two that were not taken in turn."""
        self._tell_pair(what, "s", time, beside, of)

    def tell_memory(self, what: str, measured: int, beside: int | None = None, of: str = "by plan") -> None:
        """Of a peak, beside the planned one."""
        self._tell_pair(what, "GiB", measured / 2**30, None if beside is None else beside / 2**30, of)

    def tell_count(self, what: str, count: int, note: str = "") -> None:
        """Of things that are counted."""
        self.tell({"what": what, "unit": "", "measured": count, **({"note": note} if note else {})})

    def _tell_pair(self, what: str, unit: str, measured: float, beside: float | None, of: str) -> None:
        row: Row = {"what": what, "unit": unit, "measured": measured}
        if beside is not None:
            row |= {"beside": beside, "of": of, "ratio": measured / beside}
        self.tell(row)


def this_device() -> torch.device:
    """The GPU where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_facts() -> Row:
    """Device, memory, versions and date."""
    facts = describe_machine()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        facts["compute_capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
    return facts


def peak_and_time(place: Place, step: Callable[[], object], before: int | None) -> tuple[int, int | None, float]:
    """Of a step that is made twice: the first one's peak beyond what is kept, the peak of all, the second one's time.

    `before` is what was allocated before anything of it was made; of a CPU the second peak is not known.
    """
    kept = place.allocated()
    peak, _ = peak_and_seconds(step)
    return peak, None if kept is None else kept - before + peak, seconds(step)


def peak_and_seconds(work: Callable[[], object]) -> tuple[int, float]:
    """Of one call, of whose time the bookkeeping of its memory is no part."""
    times: list[float] = []
    peak = peak_bytes(lambda: times.append(seconds(work)))
    return peak, times[0]
