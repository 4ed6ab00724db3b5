"""Files of prompts that are more than a list: a column of a csv, and groups with seeds."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class GroupedPrompts(NamedTuple):
    """The prompts of an evaluation of erasers."""

    groups: dict[str, list[str]]
    seeds: dict[str, list[int | None]]


def read_prompt_column(path: str | os.PathLike, column: str = "prompt") -> list[str]:
    """Prompts of a UTF-8 text file, one a line, or of a column of a file that ends in `.csv`.

    There are no comments: `# 1` is a prompt. Blank lines are passed over.

    Raises:
        ValueError: no such file or column, a broken row, or no prompt.
    """
    if not Path(path).is_file():
        raise ValueError(f"`prompt_file` must be a text or csv file, got {path}: no such file.")
    if Path(path).suffix.lower() == ".csv":
        texts = [row[column] for row in _read_rows(path, [column])]
    else:
        texts = Path(path).read_text(encoding="utf-8-sig").splitlines()
    prompts = [
        prompt for prompt in (" ".join(text.splitlines()).strip() for text in texts) if prompt
    ]
    if not prompts:
        raise ValueError(f"`prompt_file` must hold at least one prompt, got none in {path}.")
    return prompts


def read_grouped_prompts(path: str | os.PathLike) -> GroupedPrompts:
    """The prompts of a csv file by their groups, with the seeds of those that have one.

    Args:
        path: csv with the columns `prompt` and `group`, and maybe `seed`; others are passed over.

    Raises:
        ValueError: no such file or column, an empty field, or a seed that is no whole number from 0.
    """
    if not Path(path).is_file():
        raise ValueError(f"`evaluation_prompts` must be a csv file, got {path}: no such file.")
    found = GroupedPrompts({}, {})
    for number, row in enumerate(_read_rows(path, ["prompt", "group"]), start=1):
        prompt, group = (" ".join(row[name].split()) for name in ("prompt", "group"))
        seed = row.get("seed", "").strip()
        if not prompt or not group or (seed and not (seed.isascii() and seed.isdigit())):
            raise ValueError(
                f"Row {number} of {path} must have a prompt, a group and at most a seed from 0, got "
                f"{prompt!r}, {group!r} and {seed!r}."
            )
        found.groups.setdefault(group, []).append(prompt)
        found.seeds.setdefault(group, []).append(int(seed) if seed else None)
    return found


def _read_rows(path: str | os.PathLike, columns: Sequence[str]) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        missing = [name for name in columns if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} must have the columns {missing}, got {reader.fieldnames}.")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"Line {reader.line_num} of {path} must have {len(reader.fieldnames or [])} "
                    "fields like the header. Quote texts that hold commas."
                )
            rows.append(row)
    return rows
