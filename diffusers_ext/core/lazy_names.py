"""Names of a package that are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def by_name(modules: Mapping[str, str]) -> dict[str, str]:
    """`{name: module}` of `{module: "names between spaces"}`."""
    return {name: module for module, names in modules.items() for name in names.split()}


def imported_name(package: str, sources: Mapping[str, str], name: str) -> Any:
    """What the `__getattr__` of a package returns; the package keeps it.

    Args:
        package: its `__name__`.
        sources: `{name: module}`.
        name: one of these.

    Raises:
        AttributeError: another name.
    """
    if name not in sources:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    found = getattr(import_module(sources[name]), name)
    setattr(sys.modules[package], name, found)
    return found
