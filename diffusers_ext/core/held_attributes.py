"""Attributes that have another value for a while, also where several threads want that at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _Absent:
    """In the place of the value of an attribute that was not there."""


class _Holding:
    """The value that an attribute had, and those that contexts have given it since, in order."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.held: list[tuple[object, Any]] = []


_LOCK = threading.RLock()
_HOLDINGS: dict[tuple[int, str], _Holding] = {}


@contextmanager
def held_attribute(
    owner: object, name: str, value: Any, write: Callable[[object, str, Any], None] = setattr
) -> Iterator[None]:
    """Give an attribute a value while the context is open.

    Contexts on the same attribute are counted: whatever the order in which they close, also in other
    threads and after an exception, the attribute has the latest value that is still held, and after
    the last one that which it had before the first. An attribute that was not there goes again.

    Args:
        write: called as `write(owner, name, value)` in the place of `setattr`.
    """
    key, mine = (id(owner), name), object()
    with _LOCK:
        holding = _HOLDINGS.get(key) or _Holding(getattr(owner, name, _Absent))
        write(owner, name, value)
        holding.held.append((mine, value))
        _HOLDINGS[key] = holding
    try:
        yield
    finally:
        with _LOCK:
            was_latest = holding.held[-1][0] is mine
            holding.held = [entry for entry in holding.held if entry[0] is not mine]
            if not holding.held:
                del _HOLDINGS[key]
            if was_latest:
                restored = holding.held[-1][1] if holding.held else holding.before
                if restored is _Absent:
                    delattr(owner, name)
                else:
                    write(owner, name, restored)
