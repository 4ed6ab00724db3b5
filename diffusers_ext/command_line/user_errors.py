"""Errors that tell the user what to change; all others are defects and keep their traceback."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import Any


_NAME = re.compile(r"`([A-Za-z_][A-Za-z_0-9]*)`")


def user_errors() -> tuple[type[BaseException], ...]:
    """Wrong input, missing files or extras, refusals of the Hub, a lost connection, no memory, NaN."""
    from huggingface_hub.utils import httpx
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    # What the Hub lacks or refuses is an `OSError`, a lost connection is not.
    return (ValueError, TypeError, OSError, ImportError, httpx.HTTPError, SafetensorError,
            FloatingPointError, OutOfMemoryError)  # fmt: skip


def error_line(error: BaseException, args: argparse.Namespace, flags: Mapping[str, str]) -> str:
    """What an error says, in one line, in the words of the command line.

    Functions name their parameters. Here a name becomes the flag of that name. Where the value that
    was refused is another argument's, the error is about that one: `pretrained_model_name_or_path`
    of statistics is `--statistics`.

    Args:
        error: any.
        args: parsed arguments.
        flags: what each of them is called on the command line.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {error.filename}"
    first = _NAME.match(text)
    if first is not None:
        refused = text.partition(", got ")[2]
        about = _argument_of(refused, first[1], vars(args), flags)
        if about is not None:
            text = f"`{flags[about]}`{text[first.end() :]}"
    return _NAME.sub(lambda match: f"`{flags.get(match[1], match[1])}`", text)


def _argument_of(
    refused: str, name: str, values: Mapping[str, Any], flags: Mapping[str, str]
) -> str | None:
    """The argument whose value an error is about, if that is not the one of the name it uses."""
    if name in flags and any(_begins(refused, text) for text in _texts(values.get(name))):
        return None
    found = [
        other
        for other in flags
        if any(len(text) > 1 and _begins(refused, text) for text in _texts(values.get(other)))
    ]
    return found[0] if len(found) == 1 else None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (item for item in value if isinstance(item, str))


def _begins(refused: str, text: str) -> bool:
    """Whether what follows `got` is this text, and not a longer one."""
    return any(
        refused.startswith(form) and not re.match(r"[\w/-]", refused[len(form) :])
        for form in (text, repr(text))
    )
