"""Writes rows of `docs/compatibility.md`, as `make test-oldest` and others do: `python docs/compatibility_table.py`.

A row stands between the marks of its name; what was run, the versions, the counts of pytest and the date are in it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

PAGE = Path(__file__).with_name("compatibility.md")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "datasets")


def counts(report: Path) -> str:
    """Of a JUnit report of pytest, in words."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    numbers = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = numbers["failures"] + numbers["errors"]
    passed = numbers["tests"] - failed - numbers["skipped"]
    return f"{passed} passed, {failed} failed, {numbers['skipped']} skipped"


def row(title: str, result: str) -> str:
    """A line of the table for the Python that runs."""
    versions = [importlib.metadata.version(name).split("+")[0] for name in PACKAGES]
    date = datetime.date.today().isoformat()
    return f"| {title} | {platform.python_version()} | {' | '.join(versions)} | {result} | {date} |"


def replaced(page: str, title: str, line: str) -> str:
    """The page with the row of this title replaced, or added at the end of the table."""
    pattern = re.compile(rf"^\| {re.escape(title)} \|.*$", re.MULTILINE)
    if pattern.search(page):
        return pattern.sub(lambda _: line, page, count=1)
    table = re.compile(r"(^\|(?: --- \|)+\n(?:\|.*\n)*)", re.MULTILINE)
    if not table.search(page):
        raise ValueError(f"{PAGE} must have a table, got none.")
    return table.sub(lambda found: found[1] + line + "\n", page, count=1)


def main() -> int:
    """Write one row; ends with 1 where a test has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("title", help="of the row, such as 'oldest'")
    parser.add_argument("report", type=Path, help="what `pytest --junit-xml` has written")
    args = parser.parse_args()
    result = counts(args.report)
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), args.title, row(args.title, result)), encoding="utf-8")
    print(result)
    return int(", 0 failed," not in result)


if __name__ == "__main__":
    sys.exit(main())
