"""Files of prompts: text, one a line, and a column of a csv; every text in them is a prompt."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path


def one_line(prompt: str) -> str:
    """A prompt without line breaks, each of which becomes a space, and without outer blanks."""
    return " ".join(prompt.splitlines()).strip()


def read_prompt_file(path: str | os.PathLike, column: str = "prompt") -> list[str]:
    """Prompts of a UTF-8 text file, one a line, or of a column of a csv file.

    There are no comments and no missing values: `# 1`, `None`, `NA` and `null` are prompts. Only
    blank lines are passed over.

    Args:
        path: a name that ends in `.csv` is read as csv, with its commas quoted; all others as text.
        column: of the csv file.

    Raises:
        ValueError: no such file, no such column, a broken row, or no prompt.
    """
    if not Path(path).is_file():
        raise ValueError(f"`prompt_file` must be a text or csv file, got {path}: no such file.")
    is_csv = Path(path).suffix.lower() == ".csv"
    texts = read_csv_column(path, column) if is_csv else read_lines(path)
    prompts = [line for line in map(one_line, texts) if line]
    if not prompts:
        raise ValueError(f"`prompt_file` must hold at least one prompt, got none in {path}.")
    return prompts


def read_lines(path: str | os.PathLike) -> Iterator[str]:
    """The lines of a UTF-8 text file."""
    with open(path, encoding="utf-8-sig") as handle:
        yield from handle


def read_csv_column(path: str | os.PathLike, column: str) -> Iterator[str]:
    """The texts of one column, as they are written.

    Raises:
        ValueError: no such column, or a row with more or fewer fields than the header.
    """
    with open(path, newline="", encoding="utf-8-sig") as handle:
        rows = csv.reader(handle)
        header = next(rows, [])
        if column not in header:
            raise ValueError(
                f"{path} must have the column {column!r}, got {header}. Name another one."
            )
        position = header.index(column)
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(
                    f"Line {rows.line_num} of {path} must have {len(header)} fields like the "
                    f"header, got {len(row)}. Quote texts that hold commas."
                )
            if row:
                yield row[position]
