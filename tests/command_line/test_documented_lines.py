from __future__ import annotations

import re
import shlex
from pathlib import Path

from diffusers_ext.command_line.main import build_parser

ROOT = Path(__file__).parents[2]
PAGES = [path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")) if path.is_file()]


def documented_lines(page: Path) -> list[str]:
    """What stands after `diffusers-ext` in the code of a page, without comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line.partition(" ")[2] for line in lines if line.startswith("diffusers-ext ")]


LINES = [(page.name, line) for page in PAGES for line in documented_lines(page)]


def test_pages_show_the_command():
    assert {name for name, _ in LINES} >= {"README.md", "README_zh.md"}


def test_documented_lines_parse(subtests):
    for page, line in LINES:
        with subtests.test(page=page, line=line):
            words = shlex.split(line, comments=True)
            assert build_parser().parse_args(words).command.name.split()[0] == words[0]
