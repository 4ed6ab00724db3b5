"""What threads that share a model have each for itself: whether erasers are on, their scales, what they added."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

_GATE_LOCK = threading.Lock()


class ThreadGate(threading.local):
    """Whether erasers are on in this thread, as a tensor of one or zero.

    A compiled graph cannot read a context variable. It reads this tensor, at every call, as the calling thread has it,
    and is neither broken nor compiled again.
    """

    def __init__(self) -> None:
        self.openness = torch.ones((), device="cpu", dtype=torch.float32)
        self.closings = [0]

    def __reduce__(self) -> tuple[type[ThreadGate], tuple[()]]:
        return type(self), ()  # a copy of the model has gates of its own

    def close(self) -> Callable[[], None]:
        """Close it in this thread; returns what takes that back, from any thread."""
        openness, closings = self.openness, self.closings
        with _GATE_LOCK:
            closings[0] += 1
            openness.fill_(0.0)

        def reopen() -> None:
            with _GATE_LOCK:
                closings[0] -= 1
                openness.fill_(float(closings[0] == 0))

        return reopen


class ThreadScale(threading.local):
    """What this thread adds to the scale of an eraser, as a tensor, which a compiled graph reads as it does a gate."""

    def __init__(self) -> None:
        self.added = torch.zeros((), device="cpu", dtype=torch.float32)
        self.parts: list[float] = []

    def __reduce__(self) -> tuple[type[ThreadScale], tuple[()]]:
        return type(self), ()

    def add(self, scale: float) -> Callable[[], None]:
        """Add to it in this thread; returns what takes that back, from any thread."""
        added, parts = self.added, self.parts

        def change(note: Callable[[float], None]) -> None:
            with _GATE_LOCK:
                note(scale)
                added.fill_(sum(parts))

        change(parts.append)
        return lambda: change(parts.remove)


class ThreadRecord(threading.local):
    """What linear erasers added in the projection of this thread's call, until its attention ends."""

    def __init__(self) -> None:
        self.added: dict[str, torch.Tensor] = {}

    def __reduce__(self) -> tuple[type[ThreadRecord], tuple[()]]:
        return type(self), ()

    def put(self, added: dict[str, torch.Tensor]) -> None:
        """Keep it."""
        self.added = added

    def take(self) -> dict[str, torch.Tensor]:
        """It, kept no longer."""
        added, self.added = self.added, {}
        return added
