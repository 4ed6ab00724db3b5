"""What a sub-command is, and what it hands back."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


PROGRAM = "diffusers-ext"
DONE, FAILED, WRONG_USAGE, DOES_NOT_FIT, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes


@dataclass(frozen=True)
class Outcome:
    """What a command found or did.

    Attributes:
        facts: for `--json`; JSON-able but for paths.
        text: for people, without a final line break.
        code: exit code.
    """

    facts: dict[str, Any]
    text: str
    code: int = DONE


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Attributes:
        name: words after the program's name, e.g. `"convert lora"`.
        summary: one line for the list of commands.
        description: what it does, for its own help.
        examples: whole command lines without the program's name, at least one.
        add_arguments: adds its own arguments to a parser.
        run: does it. Imports what it needs when it is called, so that help comes fast.
        output: name of the argument that says where a result goes; `None` where nothing is written.
        result_names: files that tell of a finished result in a folder; empty where `output` is a file.
    """

    name: str
    summary: str
    description: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Outcome]
    output: str | None = None
    result_names: tuple[str, ...] = ()
