"""Keywords that are not known: refused, with what somebody may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(given: str | Iterable[str], known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for an error, with the nearest known name of each; empty without any."""
    names = [given] if isinstance(given, str) else list(given)
    options = {str(name).lower(): str(name) for name in known}
    found = [get_close_matches(str(name).lower(), options, n=1, cutoff=0.6) for name in names]
    meant = dict.fromkeys(options[match] for matches in found for match in matches)
    return f" Did you mean {' and '.join(map(repr, meant))}?" if meant else ""


def check_keywords(
    arguments: Iterable[str], known: Iterable[str], function: str, takes: str | None = None
) -> None:
    """Raise `TypeError`, as Python does, for a keyword that would be passed over in silence.

    Args:
        takes: a clause with the most useful of the known names, such as `"it takes rank"`.
    """
    known = list(known)
    for name in arguments:
        if name not in known:
            told = f": {takes}." if takes else "."
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}{told}"
                f"{did_you_mean(name, known)}"
            )
