"""What a sub-command is, where it writes, and what it hands back."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from diffusers_ext.evaluation.report_files import SavedReport


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


@contextmanager
def result_place(args: argparse.Namespace) -> Iterator[None]:
    """Check and hold the folder, or check the file, that `args.command` writes.

    Raises:
        ValueError: there is a finished result and no `--overwrite_output_dir`, or another process
            writes to the folder.
    """
    command: Command = args.command
    if command.output is None:
        yield
        return
    from diffusers_ext.core.folder_lock import folder_lock
    from diffusers_ext.core.result_folder import check_no_file, check_no_result

    place = getattr(args, command.output)
    if not command.result_names:
        check_no_file(place, args.overwrite_output_dir, flag=command.output)
        yield
        return
    with folder_lock(place, command.output):
        if not args.overwrite_output_dir:
            check_no_result(place, command.result_names, flag=command.output)
        yield


def report_outcome(report: SavedReport, folder: Path, table: str) -> Outcome:
    """The figures of an evaluation, without one row for every picture, and its files in `folder`."""
    facts = {name: getattr(report, name) for name in report.saved if name != "rows"}
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    files = sorted(path.relative_to(folder).as_posix() for path in paths)
    return Outcome({"output_dir": folder, "files": files, **facts}, f"{table}\nWrote {folder}")
