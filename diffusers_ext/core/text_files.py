"""Text, JSON, YAML and tables of prompts as their users wrote them, or one error that names file, place and remedy."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

MAX_TEXT_BYTES = 2**30  # of prompts, a list of which must fit the memory
MAX_JSON_BYTES = 2**25  # what is read is up to 25 times as large
MAX_YAML_BYTES = 2**20  # read by Python code, some 100 kB in a second
MAX_DEPTH = 100  # far below the interpreter's limit, which all later steps share
_MAX_YAML_NODES = 100_000  # with what aliases repeat
_MAX_NUMBER = 100  # characters; YAML's `1:1:1:...` takes quadratic time
TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}  # of European spreadsheets the second
Row = tuple[str, dict[str, Any]]  # ("line 3 of prompts.csv", {column: value})

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: str | os.PathLike, most_bytes: int = MAX_TEXT_BYTES) -> str:
    """A text file in UTF-8, or in UTF-16 or UTF-32 where it begins with their byte-order mark."""
    return decode(read_bytes(path, most_bytes), path)


def read_bytes(path: str | os.PathLike, most_bytes: int) -> bytes:
    """A whole file; `ValueError` for what is no regular file (a pipe would wait) or too large."""
    from diffusers_ext.core.tensor_files import check_regular_file  # with torch

    path = check_regular_file(path)
    with open(path, "rb") as handle:
        content = handle.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(
            f"{path} must have at most {most_bytes / 2**20:.0f} MiB, got {path.stat().st_size / 2**20:.1f}"
            " MiB. Split it, or check that it is the right file."
        )
    return content


def decode(content: bytes, where: str | os.PathLike) -> str:
    """Bytes of a text file as text, by their byte-order mark, UTF-8 without one."""
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    if encoding == "utf-8":  # whose mark its own decoder keeps
        content = content.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        before = content[: error.start].decode(encoding, "ignore")
        found = " ".join(f"{byte:02x}" for byte in content[error.start : error.start + 4])
        raise ValueError(
            f"Line {before.count(chr(10)) + 1} of {where} must be {encoding.upper()}, got the bytes "
            f"{found} after {before[-20:].rpartition(chr(10))[2]!r}. Save the file as UTF-8."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"Line {line} of {where} must be text, got a NUL character: a binary file, or UTF-16 "
            "without its byte-order mark. Save it as a text file in UTF-8."
        )
    return text


def read_json(path: str | os.PathLike, *, allow_nan: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds; `allow_nan` takes `NaN` and `Infinity`, which are no JSON, too."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path, allow_nan=allow_nan)


def parse_json(
    text: str | bytes, where: str | os.PathLike, expect: type | None = dict, *, allow_nan: bool = False
) -> Any:
    """What JSON from `where`, such as `"line 3 of pairs.jsonl"`, holds: a `dict` or `list` as `expect` says."""
    if isinstance(text, bytes):
        text = decode(text, where)
    try:
        strict = {} if allow_nan else {"parse_constant": _refuse_constant, "parse_float": _finite}
        content = json.loads(text, object_pairs_hook=_without_twins, **strict)
        _check_json(content)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP.format(where)) from error
    except ValueError as error:
        raise ValueError(f"{where} must hold JSON, got: {error}.") from error
    if expect is not None and not isinstance(content, expect):
        kind = "object" if expect is dict else "list"
        raise ValueError(f"{where} must hold a JSON {kind}, got a {type(content).__name__}.")
    return content


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping that a YAML file holds; no tag of it makes a Python object.

    YAML 1.1 is read: the unquoted words `yes`, `no`, `on` and `off` are truth values.
    """
    text = read_text(path, MAX_YAML_BYTES)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is not None:
            _repeated_nodes(root, (), {})
        content = None if root is None else loader.construct_document(root)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP.format(path)) from error
    # Values that an explicit tag does not fit end in any of these.
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a YAML file, got: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a YAML mapping, got {type(content).__name__}.")
    return content


_TOO_DEEP = "{} must be nested at most " + str(MAX_DEPTH) + " deep, got more. Get the file again."


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {max(counts, key=counts.get)!r} twice in one object")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"the number {name}")


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"the number {text}, which is too large")
    return float(text)


def _check_json(content: Any) -> None:
    """Raise for what is nested too deeply, and for half characters, which no file can hold."""
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RecursionError
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not value.isascii():
                value.encode()
        level = inner


def _repeated_nodes(node: yaml.Node, above: tuple[int, ...], known: dict[int, int]) -> int:
    """How many nodes one stands for when its aliases are written out; raises where it cannot be."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above or len(above) > MAX_DEPTH:
        raise RecursionError
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")):
        value = node.value.lower()
        if len(value) > _MAX_NUMBER or value.strip("+-") in (".inf", ".nan"):
            raise ValueError(f"the number {value[:20]} in line {node.start_mark.line + 1}")
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [part for pair in node.value for part in pair]
    inside = above + (id(node),)
    total = 1 + sum(_repeated_nodes(child, inside, known) for child in children)
    if total > _MAX_YAML_NODES:
        raise ValueError(f"more than {_MAX_YAML_NODES} values with what its aliases repeat")
    known[id(node)] = total
    return total


def _check_keys(node: yaml.MappingNode) -> None:
    found: set[Hashable] = set()
    for key, _ in node.value:
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
        if name in found:
            raise ValueError(f"the key {key.value!r} twice, in line {key.start_mark.line + 1}")
        found.add(name)


def read_prompt_texts(
    path: str | os.PathLike, column: str = "prompt", *, argument: str, comments: bool = False
) -> list[str]:
    """The prompts of a text file, one a line, or of a table; outer blanks taken off and every line break made a space.

    There are no missing values: `None`, `NA` and `null` are prompts. Empty ones are passed over.
    """
    check_prompt_file(path, argument)
    is_table = Path(path).suffix.lower() in TABLE_SUFFIXES
    texts = [row[column] for _, row in read_rows(path, [column])] if is_table else read_text_lines(path)
    prompts = [line for line in map(one_line, texts) if line]
    if comments and not is_table:
        prompts = [line for line in prompts if not line.startswith("#")]
    if not prompts:
        raise ValueError(f"`{argument}` must hold at least one prompt, got none in {path} with {len(texts)} lines.")
    return prompts


def read_grouped_prompts(
    path: str | os.PathLike, argument: str
) -> tuple[dict[str, list[str]], dict[str, list[int | None]]]:
    """The `prompt`s of a table by their `group`, and in the same way the `seed`s that it names for some of them."""
    check_prompt_file(path, argument, tables_only=True)
    groups, seeds = {}, {}
    for number, (_, row) in enumerate(read_rows(path, ["prompt", "group"], ["seed"]), start=1):
        prompt, group, seed = (" ".join(row[name].split()) for name in ("prompt", "group", "seed"))
        if not prompt or not group or (seed and not (seed.isascii() and seed.isdigit())):
            raise ValueError(
                f"Row {number} of {path} must have a prompt, a group and at most a seed from 0, got "
                f"{prompt!r}, {group!r} and {seed!r}."
            )
        groups.setdefault(group, []).append(prompt)
        seeds.setdefault(group, []).append(int(seed) if seed else None)
    return groups, seeds


def one_line(prompt: str) -> str:
    """A prompt without line breaks, each of which becomes a space, and without outer blanks."""
    return " ".join(prompt.splitlines()).strip()


def check_prompt_file(path: str | os.PathLike, argument: str, *, tables_only: bool = False) -> None:
    """Raise `ValueError` where a file of prompts is not there or of a format that is not read."""
    path = Path(path)
    known = TABLE_SUFFIXES if tables_only else (".txt", *TABLE_SUFFIXES)
    kind = "a table of prompts" if tables_only else "a text file of prompts or a table"
    if not path.is_file():
        found = "a folder or pipe" if path.exists() else "no such file"
        raise ValueError(f"`{argument}` must be {kind} ({', '.join(known)}), got {path}: {found}.")
    if path.suffix.lower() not in known and (path.suffix or tables_only):
        raise ValueError(
            f"`{argument}` must end in one of {', '.join(known)}, got {path}, of which no line was "
            "read. Save a sheet as CSV in UTF-8, and a list as a .txt file with one prompt a line."
        )


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
        _check_columns(where, columns, row)
        yield where, {name: _text(row.get(name), name, where) for name in (*columns, *optional)}


def _check_columns(where: str | Path, columns: Sequence[str], found: Collection[str]) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        names = f"the column {missing[0]!r}" if len(missing) == 1 else f"the columns {missing}"
        raise ValueError(f"{where} must have {names}, got {list(found)}. Name another one.")


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
    text, skipped = read_text(path), 0
    delimiters = ("\t",) if Path(path).suffix.lower() == ".tsv" else tuple(_DELIMITERS)
    first, _, rest = text.partition("\n")
    if first.rstrip("\r") in {f"sep={mark}" for mark in _DELIMITERS}:  # Excel's
        delimiters, text, skipped = (first[4],), rest, 1
    headers = {mark: _csv_header(text, mark) for mark in delimiters}
    delimiter, header = max(headers.items(), key=lambda one: (len(set(columns) & set(one[1])), len(one[1])))
    _check_columns(path, columns, header)
    twice = [name for name in columns if header.count(name) > 1]
    if twice:
        raise ValueError(f"{path} must have the column {twice[0]!r} once, got {header}.")
    rows = _csv_fields(path, text, delimiter, skipped)
    next(rows)
    for line, fields in rows:
        if len(fields) != len(header):
            raise ValueError(
                f"Line {line} of {path} must have {len(header)} fields like the header, got "
                f"{len(fields)}. Quote texts that hold {_DELIMITERS[delimiter]}."
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
        return _json_lines(text, path, columns)
    content = parse_json(text, path, None)
    if isinstance(content, dict):
        lists = {name: content[name] for name in content if isinstance(content[name], list)}
        _check_columns(path, columns, lists)
        if len({len(lists[name]) for name in columns}) > 1:
            raise ValueError(f"The lists {list(columns)} of {path} must be equally long.")
        size = len(lists[columns[0]])
        content = [{name: values[row] for name, values in lists.items() if len(values) == size} for row in range(size)]
    if not isinstance(content, list):
        raise ValueError(f"{path} must hold a list of prompts or of objects, got a {type(content).__name__}.")
    return (_json_row(item, f"item {number} of {path}", columns) for number, item in enumerate(content, start=1))


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
            _check_columns(path, columns, file.schema_arrow.names)
            # Pictures beside the texts are most of such a file.
            large = (types.is_nested, types.is_binary, types.is_large_binary)
            small = [one.name for one in file.schema_arrow if not any(is_kind(one.type) for is_kind in large)]
            wanted = [name for name in file.schema_arrow.names if name in columns or name in small]
            rows = (row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
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
