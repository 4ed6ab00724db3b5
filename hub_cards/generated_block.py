"""The part of a README that is generated, between two marks; everything else is its owner's."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple


_END = "<!-- diffusers_ext:end -->"
_NOTE = (
    "<!-- Generated, down to the end mark: the next push replaces it. "
    "Write your own words above or below. -->"
)
_BLOCK = re.compile(
    r"^<!-- diffusers_ext:begin ([0-9a-f]{12}) -->[ \t]*\n"
    r"((?:(?!<!-- diffusers_ext:begin).*\n)*?)"
    r"<!-- diffusers_ext:end -->[ \t]*$",
    re.MULTILINE,
)
_MARK = re.compile(r"^<!-- diffusers_ext:(begin|end).*\n?", re.MULTILINE)


class GeneratedBlock(NamedTuple):
    """One generated part found in a text."""

    before: str
    words: str  # between the marks
    after: str
    edited: bool  # whether somebody has changed the words since


def mark_generated(words: str) -> str:
    """Words between marks; the first mark holds a digest, which tells whether they were edited.

    Raises:
        ValueError: they hold a mark themselves.
    """
    if _MARK.search(words):
        raise ValueError("A card's text must not hold the marks of its generated part, got one.")
    words = f"{_NOTE}\n\n{words.strip()}\n"
    return f"<!-- diffusers_ext:begin {_digest(words)} -->\n{words}{_END}"


def find_generated(text: str) -> GeneratedBlock | None:
    """The first generated part of a text with `\\n` line ends; `None` without one."""
    found = _BLOCK.search(text)
    if found is None:
        return None
    digest, words = found.groups()
    return GeneratedBlock(
        text[: found.start()], words, text[found.end() :], _digest(words) != digest
    )


def without_marks(words: str) -> str:
    """Words less whatever marks are left in them, and less the remark for the owner."""
    return _MARK.sub("", words).replace(f"{_NOTE}\n", "")


def _digest(words: str) -> str:
    return hashlib.sha256(words.strip().encode()).hexdigest()[:12]
