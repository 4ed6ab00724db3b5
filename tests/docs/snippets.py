"""The code of a page: its fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples" / "README.md",
]


class Snippet(NamedTuple):
    """One fenced block.

    Attributes:
        line: of the page where its code begins, from 1.
        language: after the fence.
        text: the code.
    """

    line: int
    language: str
    text: str


def snippets(page: Path) -> list[Snippet]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Snippet(text[: f.start(2)].count("\n") + 1, f[1], f[2]) for f in fences]


def commands(block: str) -> list[list[str]]:
    """The words of each command of a shell block, with variables of its `export` lines put in."""
    found, variables = [], {}
    for line in block.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        if words[:1] == ["export"]:
            name, _, value = words[1].partition("=")
            variables[name] = value
        elif words:
            found.append(words)
    return found
