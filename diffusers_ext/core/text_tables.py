"""Prompts and their columns in text, CSV, TSV, JSON, JSONL and parquet files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_ext.core.text_files import MAX_JSON_BYTES, parse_json, read_text

TEXT_SUFFIXES = ("", ".txt")
TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_DELIMITERS = (",", ";", "\t")  # of European spreadsheets the second
_DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}

# (such as "line 3 of prompts.csv", {column: value})
Row = tuple[str, dict[str, Any]]


def read_prompt_texts(
    path: str | os.PathLike, column: str = "prompt", *, argument: str, comments: bool = False
) -> list[str]:
    """The prompts of a text file, one a line, or of a table; outer blanks taken off and every line break made a space.

    There are no missing values: `None`, `NA` and `null` are prompts. Empty ones are passed over.
    """
    check_prompt_file(path, argument)
    if is_table(path):
        texts = [row[column] for _, row in read_rows(path, [column])]
    else:
        texts = read_text_lines(path)
    prompts = [line for line in map(one_line, texts) if line]
    if comments and not is_table(path):
        prompts = [line for line in prompts if not line.startswith("#")]
    if not prompts:
        raise ValueError(f"`{argument}` must hold at least one prompt, got none in {path} with {len(texts)} lines.")
    return prompts


class GroupedPrompts(NamedTuple):
    """The prompts of an evaluation, and of each the seed that the file names for it."""

    groups: dict[str, list[str]]
    seeds: dict[str, list[int | None]]


def read_grouped_prompts(path: str | os.PathLike, argument: str) -> GroupedPrompts:
    """The prompts of a table with the columns `prompt` and `group`, and maybe `seed`; others are passed over."""
    check_prompt_file(path, argument, TABLE_SUFFIXES)
    found = GroupedPrompts({}, {})
    for number, (_, row) in enumerate(read_rows(path, ["prompt", "group"], ["seed"]), start=1):
        prompt, group, seed = (" ".join(row[name].split()) for name in ("prompt", "group", "seed"))
        if not prompt or not group or (seed and not (seed.isascii() and seed.isdigit())):
            raise ValueError(
                f"Row {number} of {path} must have a prompt, a group and at most a seed from 0, got "
                f"{prompt!r}, {group!r} and {seed!r}."
            )
        found.groups.setdefault(group, []).append(prompt)
        found.seeds.setdefault(group, []).append(int(seed) if seed else None)
    return found


def one_line(prompt: str) -> str:
    """A prompt without line breaks, each of which becomes a space, and without outer blanks."""
    return " ".join(prompt.splitlines()).strip()


def check_prompt_file(
    path: str | os.PathLike, argument: str, suffixes: Sequence[str] = TEXT_SUFFIXES + TABLE_SUFFIXES
) -> None:
    """Raise `ValueError` where a file of prompts is not there or of a format that is not read."""
    path = Path(path)
    known = [suffix for suffix in suffixes if suffix]
    kind = "a text file of prompts or a table" if "" in suffixes else "a table of prompts"
    if not path.is_file():
        found = "a folder or pipe" if path.exists() else "no such file"
        raise ValueError(f"`{argument}` must be {kind} ({', '.join(known)}), got {path}: {found}.")
    if path.suffix.lower() not in suffixes:
        raise ValueError(
            f"`{argument}` must end in one of {', '.join(known)}, got {path}, of which no line was "
            "read. Save a sheet as CSV in UTF-8, and a list as a .txt file with one prompt a line."
        )


def is_table(path: str | os.PathLike) -> bool:
    """Whether a file has columns, by the end of its name."""
    return Path(path).suffix.lower() in TABLE_SUFFIXES


def read_text_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a text file, without their ends; other breaks stay in them."""
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_rows(path: str | os.PathLike, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a table, each with where it stands; all its columns are texts, and others are passed over.

    A whole number is the text of its digits, as in CSV, and nothing (`null`) the empty one. An `optional` column is
    `""` where the table has none.
    """
    for where, row in _READERS[Path(path).suffix.lower()](Path(path), columns):
        missing = [name for name in columns if name not in row]
        if missing:
            raise _no_columns(where, missing, row)
        yield where, {name: _text(row.get(name), name, where) for name in (*columns, *optional)}


def _no_columns(where: str, missing: Sequence[str], found: Iterable[str]) -> ValueError:
    names = f"the column {missing[0]!r}" if len(missing) == 1 else f"the columns {list(missing)}"
    return ValueError(f"{where} must have {names}, got {list(found)}. Name another one.")


def _text(value: Any, column: str, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():  # what pandas makes of whole numbers
        return str(int(value))
    if value is None or isinstance(value, str):
        return value or ""
    raise ValueError(f"{column!r} must be a text in {where}, got {value!r:.80}.")


def read_csv(path: str | os.PathLike, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a CSV file whose fields are parted by commas, semicolons or tabs, all columns."""
    text = read_text(path)
    first, _, rest = text.partition("\n")
    if first.rstrip("\r") in {f"sep={delimiter}" for delimiter in _DELIMITERS}:  # Excel's
        delimiters, text, skipped = (first[4],), rest, 1
    else:
        tabs = Path(path).suffix.lower() == ".tsv"
        delimiters, skipped = ("\t",) if tabs else _DELIMITERS, 0
    headers = {mark: _csv_header(text, mark) for mark in delimiters}
    known = {mark: len(set(columns) & set(header)) for mark, header in headers.items()}
    delimiter = max(delimiters, key=lambda mark: (known[mark], len(headers[mark])))
    header = headers[delimiter]
    missing = [name for name in columns if name not in header]
    if missing:
        raise _no_columns(str(path), missing, header)
    twice = [name for name in columns if header.count(name) > 1]
    if twice:
        raise ValueError(f"{path} must have the column {twice[0]!r} once, got {header}.")
    rows = _csv_fields(path, text, delimiter, skipped)
    next(rows)
    for line, fields in rows:
        if len(fields) != len(header):
            raise ValueError(
                f"Line {line} of {path} must have {len(header)} fields like the header, got "
                f"{len(fields)}. Quote texts that hold {_DELIMITER_NAMES[delimiter]}."
            )
        yield f"line {line} of {path}", dict(zip(header, fields, strict=True))


def _csv_header(text: str, delimiter: str) -> list[str]:
    # Not strict: with another delimiter than the file's, its quotation marks stand anywhere.
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return next((row for row in rows if row), [])
    except csv.Error:
        return []


def _csv_fields(path: str | os.PathLike, text: str, delimiter: str, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, with the numbers of the lines on which they end."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1
    try:
        for fields in rows:
            if fields:
                yield rows.line_num + skipped, fields
            start = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"The row from line {start + skipped} of {path} must be CSV, got: {error}. Close every "
            'quotation mark, quote texts that begin with one, and double those in them ("").'
        ) from error


def _read_json_table(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """A list of texts or objects, an object of lists, or what JSONL files hold."""
    text = read_text(path, MAX_JSON_BYTES)
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    # As many data sets on the Hub have it: an object a line.
    if len(lines) > 1 and all(line[0] == "{" and line[-1] == "}" for line in lines):
        yield from _json_lines(text, path, columns)
        return
    content = parse_json(text, path, None)
    if isinstance(content, dict):
        lists = {name: content[name] for name in content if isinstance(content[name], list)}
        missing = [name for name in columns if name not in lists]
        if missing:
            raise _no_columns(str(path), missing, lists)
        if len({len(lists[name]) for name in columns}) > 1:
            raise ValueError(f"The lists {list(columns)} of {path} must be equally long.")
        size = len(lists[columns[0]])
        content = [{name: values[row] for name, values in lists.items() if len(values) == size} for row in range(size)]
    if not isinstance(content, list):
        raise ValueError(f"{path} must hold a list of prompts or of objects, got a {type(content).__name__}.")
    for number, item in enumerate(content, start=1):
        yield _json_row(item, f"item {number} of {path}", columns)


def _json_lines(text: str, path: Path, columns: Sequence[str]) -> Iterator[Row]:
    # Not `splitlines`: a text may hold other line breaks as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"line {number} of {path}"
            yield _json_row(parse_json(line, where, None), where, columns)


def _json_row(item: Any, where: str, columns: Sequence[str]) -> Row:
    if isinstance(item, str) and len(columns) == 1:
        return where, {columns[0]: item}
    if not isinstance(item, dict):
        raise ValueError(f"{where} must be a JSON object with {list(columns)}, got a {type(item).__name__}.")
    return where, item


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet, types

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in columns if name not in names]
            if missing:
                raise _no_columns(str(path), missing, names)
            # Pictures beside the texts are most of such a file.
            large = (types.is_nested, types.is_binary, types.is_large_binary)
            wanted = [
                field.name
                for field in file.schema_arrow
                if field.name in columns or not any(is_kind(field.type) for is_kind in large)
            ]
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number} of {path}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} must be a whole parquet file, got: {error}. Write or download it again.") from error


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": _read_json_table,
    ".jsonl": lambda path, columns: _json_lines(read_text(path), path, columns),
    ".parquet": _read_parquet,
}
