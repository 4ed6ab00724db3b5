"""Command lines of scripts and console: a parser and errors of one line, which tell the user what to change."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from diffusers_ext.core.names import did_you_mean

TRACEBACK_FLAG, OVERWRITE_FLAG = "--traceback", "--overwrite_output_dir"
WRONG_USAGE = 2


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` that shows no usage with an error, and finds the nearest name.

    Args:
        refuse_unknown: end at an unknown flag here, where this parser's flags are known, and not in the parser of the
            whole command line; for sub-commands.
        arguments: of `ArgumentParser`.
    """

    def __init__(self, *args: Any, refuse_unknown: bool = False, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.refuse_unknown = refuse_unknown
        self._line: Sequence[str] = ()

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As in the base class."""
        self._line = sys.argv[1:] if args is None else list(args)
        found, rest = super().parse_known_args(args, namespace)
        if rest and self.refuse_unknown:
            self._refuse(rest)
        return found, rest

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As in the base class; an unknown flag is told with the nearest one."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self._refuse(rest)
        return found

    def error(self, message: str) -> NoReturn:
        """End with one line, and exit code 2; with `--traceback` also say from where."""
        if message.startswith("the following arguments are required"):
            message += f".{self._meant(self._line)}"  # a misspelt one looks like a missing one
        if TRACEBACK_FLAG in self._line:
            traceback.print_stack()
        self.exit(WRONG_USAGE, f"error: {' '.join(message.split())}\n")

    def _refuse(self, rest: Sequence[str]) -> NoReturn:
        self.error(f"unrecognized arguments: {' '.join(rest)}.{self._meant(rest)}")

    def _meant(self, words: Sequence[str]) -> str:
        """The flags that are nearest to the unknown ones among some words."""
        known = [option for action in self._actions for option in action.option_strings]
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        return did_you_mean([flag for flag in flags if flag not in known], known)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = did_you_mean(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}.{meant}") from error


def add_overwrite_argument(parser: argparse._ActionsContainer) -> None:
    """Permission to replace a result."""
    parser.add_argument(
        OVERWRITE_FLAG,
        action="store_true",
        help="replace a finished result, which is refused without it; other files stay",
    )


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

    Functions name their parameters. Here a name becomes the flag of that name. Where the value that was refused is
    another argument's, the error is about that one: `pretrained_model_name_or_path` of statistics is `--statistics`.

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


def _argument_of(refused: str, name: str, values: Mapping[str, Any], flags: Mapping[str, str]) -> str | None:
    """The argument whose value an error is about, if that is not the one of the name it uses."""
    if name in flags and any(_begins(refused, text) for text in _texts(values.get(name))):
        return None
    found = [
        other for other in flags if any(len(text) > 1 and _begins(refused, text) for text in _texts(values.get(other)))
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
        refused.startswith(form) and not re.match(r"[\w/-]", refused[len(form) :]) for form in (text, repr(text))
    )
