"""The parser of all command lines: a wrong one ends in one line that names the flag and what was meant."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from diffusers_ext.core.suggestions import did_you_mean


TRACEBACK_FLAG, OVERWRITE_FLAG = "--traceback", "--overwrite_output_dir"
WRONG_USAGE = 2


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` that shows no usage with an error, and finds the nearest name.

    Args:
        refuse_unknown: end at an unknown flag here, where this parser's flags are known, and not in
            the parser of the whole command line; for sub-commands.
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
