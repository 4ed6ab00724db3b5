"""Names: imported when they are used, and refused with what somebody may have meant."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
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


def did_you_mean(given: str | Iterable[str], known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for an error, with the nearest known name of each; empty without any."""
    names = [given] if isinstance(given, str) else list(given)
    options = {str(name).lower(): str(name) for name in known}
    found = [get_close_matches(str(name).lower(), options, n=1, cutoff=0.6) for name in names]
    meant = dict.fromkeys(options[match] for matches in found for match in matches)
    return f" Did you mean {' and '.join(map(repr, meant))}?" if meant else ""


def check_keywords(arguments: Iterable[str], known: Iterable[str], function: str, takes: str | None = None) -> None:
    """Raise `TypeError`, as Python does, for a keyword that would be passed over in silence.

    Args:
        takes: a clause with the most useful of the known names, such as `"it takes rank"`.
    """
    known = list(known)
    for name in arguments:
        if name not in known:
            told = f": {takes}." if takes else "."
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}{told}{did_you_mean(name, known)}"
            )
