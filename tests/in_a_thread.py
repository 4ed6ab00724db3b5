"""Run something in another thread, as a server does with another request."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def in_a_thread(function: Callable[[], Any]) -> Any:
    """What `function` returns in a new thread, which has a context of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()
