"""The part of a README that is generated, between two marks; everything else is its owner's."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple
from urllib.parse import quote, unquote


_END = "<!-- diffusers_ext:end -->"
_NOTE = (
    "<!-- Generated, down to the end mark: the next push replaces it. "
    "Write your own words above or below. -->"
)
_BLOCK = re.compile(
    r"^<!-- diffusers_ext:begin ([0-9a-f]{12})(?: of (\S+))? -->[ \t]*\n"
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
    subfolder: str  # that they are about; empty for the root of the repository


def mark_generated(words: str, subfolder: str = "") -> str:
    """Words between marks; the first mark holds a digest, which tells whether they were edited.

    Args:
        words: about an artifact.
        subfolder: of the repository, where it is; each has a part of its own.

    Raises:
        ValueError: they hold a mark themselves.
    """
    if _MARK.search(words):
        raise ValueError("A card's text must not hold the marks of its generated part, got one.")
    words = f"{_NOTE}\n\n{words.strip()}\n"
    about = f" of {quote(subfolder)}" if subfolder else ""
    return f"<!-- diffusers_ext:begin {_digest(words)}{about} -->\n{words}{_END}"


def find_generated(text: str, subfolder: str | None = None) -> GeneratedBlock | None:
    """The first generated part of a text with `\\n` line ends; `None` without one.

    Args:
        text: to search.
        subfolder: that the part must be about; any when `None`.
    """
    for found in _BLOCK.finditer(text):
        digest, about, words = found.groups()
        about = unquote(about or "")
        if subfolder in (None, about):
            before, after = text[: found.start()], text[found.end() :]
            return GeneratedBlock(before, words, after, _digest(words) != digest, about)
    return None


def without_marks(words: str, subfolder: str | None = None) -> str:
    """Words less whatever marks are left in them, and less the remark for the owner.

    Args:
        words: of a card.
        subfolder: parts about others than it stay whole; none does when `None`.
    """
    pieces, end = [], 0
    for found in _BLOCK.finditer(words) if subfolder is not None else ():
        if unquote(found[2] or "") != subfolder:
            pieces += [_without_marks(words[end : found.start()]), found[0]]
            end = found.end()
    return "".join([*pieces, _without_marks(words[end:])])


def _without_marks(words: str) -> str:
    return _MARK.sub("", words).replace(f"{_NOTE}\n", "")


def _digest(words: str) -> str:
    return hashlib.sha256(words.strip().encode()).hexdigest()[:12]
