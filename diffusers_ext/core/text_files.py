"""Text, JSON and YAML files as their users wrote them, or one error that names file, place and remedy."""

from __future__ import annotations

import codecs
import json
import math
import os
from collections import Counter
from collections.abc import Hashable
from typing import Any

import yaml

MAX_TEXT_BYTES = 2**30  # of prompts, a list of which must fit the memory
MAX_JSON_BYTES = 2**25  # what is read is up to 25 times as large
MAX_YAML_BYTES = 2**20  # read by Python code, some 100 kB in a second
MAX_DEPTH = 100  # far below the interpreter's limit, which all later steps share
_MAX_YAML_NODES = 100_000  # with what aliases repeat
_MAX_NUMBER = 100  # characters; YAML's `1:1:1:...` takes quadratic time

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_KINDS = {dict: "object", list: "list"}


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


def read_json(path: str | os.PathLike, expect: type | None = dict, *, allow_nan: bool = False) -> Any:
    """What a JSON file holds: a `dict` or `list` as `expect` says, anything when `None`.

    `allow_nan` takes `NaN` and `Infinity`, which are no JSON, too.
    """
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path, expect, allow_nan=allow_nan)


def parse_json(
    text: str | bytes, where: str | os.PathLike, expect: type | None = dict, *, allow_nan: bool = False
) -> Any:
    """`read_json` of a text that comes from `where`, such as `"line 3 of pairs.jsonl"`."""
    if isinstance(text, bytes):
        text = decode(text, where)
    try:
        content = json.loads(
            text,
            object_pairs_hook=_without_twins,
            parse_constant=None if allow_nan else _refuse_constant,
            parse_float=float if allow_nan else _finite,
        )
        _check_json(content)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP.format(where)) from error
    except ValueError as error:
        raise ValueError(f"{where} must hold JSON, got: {error}.") from error
    if expect is not None and not isinstance(content, expect):
        raise ValueError(f"{where} must hold a JSON {_KINDS[expect]}, got a {type(content).__name__}.")
    return content


def read_yaml(path: str | os.PathLike, expect: type | None = dict) -> Any:
    """What a YAML file holds; no tag of it makes a Python object.

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
    if expect is not None and not isinstance(content, expect):
        kind = "mapping" if expect is dict else "list"
        raise ValueError(f"{path} must be a YAML {kind}, got {type(content).__name__}.")
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
                inner += value
                inner += value.values()
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
