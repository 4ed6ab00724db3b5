"""Write the tables of settings in these pages from the command lines of the training scripts.

    python docs/settings_tables.py

A page asks for a table by a line `<!-- settings: <script>: <group>, <group> -->`; everything up to the line `<!-- end
of settings -->` is written anew.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from unittest import mock

PAGES = Path(__file__).resolve().parent
sys.path.insert(0, str(PAGES.parent))  # run as a file

_BLOCK = re.compile(
    r"(<!-- settings: (?P<script>\w+): (?P<groups>[^>]+) -->\n).*?(<!-- end of settings -->)", flags=re.DOTALL
)


class _ParserFound(Exception):
    """Carries a script's parser out of its `parse_args`."""


def script_parser(script: str) -> argparse.ArgumentParser:
    """The parser that `training/<script>.py` reads its command line with."""

    def found(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _ParserFound(parser)

    module = importlib.import_module(f"training.{script}")
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", found):
        try:
            module.parse_args([])
        except _ParserFound as caught:
            return caught.args[0]
    raise ValueError(f"`script` must parse its arguments by argparse, got {script!r}.")


def settings_table(script: str, groups: list[str]) -> str:
    """A Markdown table of some argument groups of a script.

    Raises:
        ValueError: a group that the script lacks, or a flag without an explanation.
    """
    parser = script_parser(script)
    present = {group.title: group for group in parser._action_groups}
    unknown = [group for group in groups if group not in present]
    if unknown:
        raise ValueError(f"`groups` must be among {sorted(present)}, got {unknown}.")
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for group in groups:
        rows += [_row(action) for action in present[group]._group_actions if action.dest != "help"]
    return "\n".join(rows)


def _row(action: argparse.Action) -> str:
    flag = next(option for option in action.option_strings if option.startswith("--"))
    if not action.help:
        raise ValueError(f"Every setting must be explained, got {flag} without `help=`.")
    default = "" if action.default in (None, [], argparse.SUPPRESS) else action.default
    if isinstance(default, (list, tuple)):
        default = " ".join(map(str, default))
    choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
    told = action.help.removesuffix(" (default: %(default)s)")  # which Python 3.10 adds to switches
    return f"| `{flag}` | {default} | {told.replace('|', '/')}{choices} |"


def with_tables(page: str) -> str:
    """The text of a page with all of its tables written anew."""

    def table(match: re.Match[str]) -> str:
        groups = [group.strip() for group in match["groups"].split(",")]
        return f"{match[1]}{settings_table(match['script'], groups)}\n{match[4]}"

    return _BLOCK.sub(table, page)


def main() -> None:
    """Write all pages anew."""
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
