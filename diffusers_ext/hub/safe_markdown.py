"""Words of others in a card: Markdown that can neither run, nor lead astray, nor end the card.

The facts of a card come from reports and configs that somebody else may have written. Raw HTML, and links by schemes
that run or hold code, are shown as the characters that they are.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from urllib.parse import quote, unquote

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#&])")
# What a link may lead to: the web, a mail, a place in the card, or a file of the repository.
_ADDRESS = re.compile(r"(?:https?://|mailto:|#)[^\s<>\\]*", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_LINK = re.compile(r"\]\(([^)]*)")
_TAG = re.compile(r"<(?=[a-zA-Z/!?])")
# At the start of a line: fences, headings and rules, which would cut the card in parts.
_BLOCK_MARK = re.compile(r"^([ \t>]*)(`{3,}|~{3,}|#{1,6}(?=\s|$)|=+[ \t]*$|-{2,}[ \t]*$)", re.MULTILINE)
# All that addresses are made of, but the brackets that would end a link.
_KEPT = "/:?#[]@!$&'*+,;=%~"


def plain(value: object) -> str:
    """A value as one line of Markdown that shows exactly its characters, in tables as well."""
    return _SPECIAL.sub(r"\\\1", one_line(value))


def code(value: object) -> str:
    """A value as inline code, whatever backticks are in it; not for tables."""
    words = one_line(value)
    if not words:
        return "(empty)"
    fence = "`" * (1 + max(map(len, re.findall(r"`+", words)), default=0))
    padding = " " if words.startswith("`") or words.endswith("`") else ""
    return f"{fence}{padding}{words}{padding}{fence}"


def one_line(value: object) -> str:
    """A value's words with single spaces between them."""
    return " ".join(str(value).split())


def prose(words: object) -> str:
    """Words as paragraphs of Markdown, with emphasis, code, lists and harmless links as they are."""
    text = str(words).replace("\r\n", "\n").replace("\r", "\n").strip()
    text = _TAG.sub("&lt;", text).replace("]:", r"]\:")  # no HTML, no definitions of links
    text = _BLOCK_MARK.sub(r"\1\\\2", text)
    return _LINK.sub(_harmless, text)


def is_harmless(address: str) -> bool:
    """Whether an address leads to the web, to a mail, or to a file of the repository itself."""
    found = _as_browsers_read(address)
    if _ADDRESS.fullmatch(found):
        return True
    return not found.startswith(("/", "\\")) and not _SCHEME.match(found)


def link(words: str, address: str | None) -> str:
    """Markdown of a link with words as they are to be shown; the words alone where it does harm."""
    if not address or not is_harmless(address):
        return words
    return f"[{words}]({quote(address, safe=_KEPT)})"


def check_file_name(name: object, argument: str) -> str:
    """A file's name in the repository; raises `ValueError` for an address or a path out of it."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"`{argument}` must name files of the folder, got {name!r}.")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or _SCHEME.match(name):
        raise ValueError(f"`{argument}` must name files of the folder, got {name!r}: it leads out of it.")
    return name


def _harmless(found: re.Match[str]) -> str:
    address = (found[1].split() or [""])[0]
    return found[0] if is_harmless(address) else f"]\\({found[1]}"


def _as_browsers_read(address: str) -> str:
    """Without what hides a scheme: entities, escapes, percent signs, spaces and control characters."""
    found = address.strip().strip("<>")
    for _ in range(3):
        found = unquote(html.unescape(found)).replace("\\", "")
    return re.sub(r"[\x00-\x20\x7f-\xa0\u200b-\u200f\u2028\u2029\ufeff]", "", found)


def python_literal(words: str) -> str:
    """Words as a Python string in double quotes."""
    return json.dumps(str(words), ensure_ascii=False)


def count(number: int) -> str:
    """A whole number with commas."""
    return f"{int(number):,}"


def figure(value: float) -> str:
    """A measured figure with four digits; a whole number, or a large one, with all before the point."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def shown(file: str) -> str:
    """A file of the repository: a picture as such, anything else as a link."""
    address = quote(check_file_name(file, "widget"))
    is_picture = address.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".gif"))
    return f"![{plain(file)}]({address})" if is_picture else f"[{plain(file)}]({address})"


def markdown_table(table: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells as Markdown, the first row as heading; all columns after `left` ones are set right."""
    # A name may hold what would end a cell or a row.
    rows = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in table]
    rule = "|---" * left + "|---:" * (len(table[0]) - left) + "|"
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], rule, *lines[1:]])
