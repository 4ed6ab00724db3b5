"""The entry of `diffusers-ext`: parser, output, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers_ext
from diffusers_ext.command_line.collect import COLLECT, MERGE
from diffusers_ext.command_line.convert import CONVERSIONS
from diffusers_ext.command_line.debleed import DEBLEED, INTERFERENCE
from diffusers_ext.command_line.demo import DEMO
from diffusers_ext.command_line.edit import EDIT, EVALUATE_EDIT
from diffusers_ext.command_line.evaluate import EVALUATE_ERASURE, EVALUATE_FORGETTING, EVALUATE_GOLDEN_NOISE
from diffusers_ext.command_line.options import (
    DOES_NOT_FIT,
    DONE,
    FAILED,
    INTERRUPTED,
    PROGRAM,
    WRONG_USAGE,
    Command,
    result_place,
)
from diffusers_ext.command_line.plan import PLANS
from diffusers_ext.command_line.push import PUSH
from diffusers_ext.command_line.train import TRAININGS, add_trainings, show_flags, train
from diffusers_ext.training.run.launcher import process_count, process_rank
from diffusers_ext.training.run.settings import OneLineParser, error_line, user_errors


@contextlib.contextmanager
def quiet_libraries(quiet: bool) -> Iterator[None]:
    """Logs and warnings of this package on stderr, errors alone and no bars with `quiet`; all comes back as it was."""
    logger = logging.getLogger("diffusers_ext")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    try:
        with other_packages_quiet(), _no_bars() if quiet else contextlib.nullcontext():
            if quiet:
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def other_packages_quiet() -> Iterator[None]:
    """No word of other packages but errors; everything comes back as it was."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    with warnings.catch_warnings(), contextlib.ExitStack() as levels:
        warnings.filterwarnings("ignore", module=r"(?!diffusers_ext\b)")
        for library in (diffusers_logging, transformers_logging, hub_logging):
            levels.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity_error()
        yield


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    with contextlib.ExitStack() as bars:
        for library in (diffusers_logging, transformers_logging):
            if library.is_progress_bar_enabled():
                bars.callback(library.enable_progress_bar)
            library.disable_progress_bar()
        if not hub.are_progress_bars_disabled():
            bars.callback(hub.enable_progress_bars)
        hub.disable_progress_bars()
        yield


EVALUATIONS = (EVALUATE_FORGETTING, EVALUATE_GOLDEN_NOISE, EVALUATE_ERASURE, EVALUATE_EDIT)
COMMANDS = (*PLANS, COLLECT, MERGE, DEBLEED, INTERFERENCE, EDIT, *EVALUATIONS, *CONVERSIONS, PUSH, DEMO)
_GROUPS = {
    "plan": "say what memory, disk and time a run takes, before it",
    "evaluate": "compare a model with and without what one of the tools made",
    "convert": "write an artifact in another format",
}
_LINE = 88
_EXIT_CODES = f"""exit codes:
  {DONE}    done
  {FAILED}    refused or failed; one line on stderr says why
  {WRONG_USAGE}    wrong usage
  {DOES_NOT_FIT}    plan: the run does not fit the memory
  {INTERRUPTED}  interrupted"""
_EXAMPLES = f"""examples:
  {PROGRAM} plan eraser --pretrained_model_name_or_path CogVideoX-5b --memory_gib 24
  {PROGRAM} collect --help"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; parsed arguments hold their `Command` as `command`."""
    parser = OneLineParser(
        prog=PROGRAM,
        description="Tools for diffusion models: null-space DreamBooth, golden noise, an eraser.",
        epilog=f"{_EXAMPLES}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"{PROGRAM} {diffusers_ext.__version__}", help="print the version"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_trainings(commands)
    parents: dict[str, Any] = {"": commands}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in parents:
            title = _GROUPS[group]
            group_parser = commands.add_parser(group, help=title, description=title, allow_abbrev=False)
            parents[group] = group_parser.add_subparsers(metavar="WHAT", required=True)
        _add_command(parents[group], name, command)
    return parser


def _add_command(parent: Any, name: str, command: Command) -> None:
    examples = "\n".join(map(_wrapped, command.examples))
    parser = parent.add_parser(
        name,
        help=command.summary,
        description=textwrap.fill(command.description, _LINE),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        refuse_unknown=True,
    )
    command.add_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON document on stdout, also of an error")
    output.add_argument("--quiet", action="store_true", help="no logs and no progress bars")
    if command.over_file is None:  # settings of runs have these
        if command.output is not None:
            output.add_argument(
                "--overwrite_output_dir",
                action="store_true",
                help="replace a finished result, which is refused without it; other files stay",
            )
        output.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(command=command)


def _wrapped(example: str) -> str:
    """A command line as a shell takes it, broken before flags where it is long."""
    lines = [f"  {PROGRAM}"]
    for part in re.split(r" (?=--)", example):
        if len(lines[-1]) + len(part) + 3 > _LINE:
            lines.append("     ")
        lines[-1] += f" {part}"
    return " \\\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own when `None`; returns the exit code. Errors of others than users go on."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["train"] and words[1:2] and words[1] in TRAININGS:
        if {"-h", "--help"} & {*words[2:]}:
            return show_flags(words[1], words[2:])
        with other_packages_quiet():
            diffusers_ext.register()
            return train(words[1], words[2:])
    try:
        args = build_parser().parse_args(_over_file(words))
    except SystemExit as stop:  # of argparse, after its message
        return int(stop.code or DONE)
    except ValueError as error:  # of the file of `--config`
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    spare = _spare_process(args)
    if spare is not None:
        print(spare, file=sys.stderr)
        return DONE
    try:
        # Stdout holds the outcome alone.
        with contextlib.redirect_stdout(sys.stderr), quiet_libraries(args.quiet), result_place(args):
            from diffusers_ext.hub.connection import one_try_to_connect

            diffusers_ext.register()  # left out when the package was imported, so that help comes fast
            with one_try_to_connect():
                outcome = args.command.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except user_errors() as error:
        if args.traceback:
            traceback.print_exc()
        message = error_line(error, args, _flags(args.command))
        print(f"error: {message}", file=sys.stderr)
        if args.json:
            print(json.dumps({"error": {"type": type(error).__name__, "message": message}}))
        return FAILED
    print(json.dumps(outcome.facts, default=os.fspath) if args.json else outcome.text)
    return outcome.code


def _spare_process(args: argparse.Namespace) -> str | None:
    """What to say where a launcher has started several processes and this is not the first; `None` elsewhere."""
    rank, count, name = process_rank(), process_count(), args.command.name
    if rank == 0 or getattr(args, "shard", None) is not None:  # each process of an array has its own part
        return None
    return f"`{name}` is the work of one process: process {rank} of {count} leaves it to the first."


def _over_file(words: list[str]) -> list[str]:
    """A command line with the flags that the file of its `--config` stands for."""
    for command in COMMANDS:
        name = command.name.split()
        given, flags = words[: len(name)], words[len(name) :]
        if given == name and command.over_file is not None:
            if any(word.partition("=")[0] == "--config" for word in flags):
                return [*name, *command.over_file(flags), *flags]
    return words


def _flags(command: Command) -> dict[str, str]:
    """What the arguments of a command are called on its command line."""
    parser = argparse.ArgumentParser(add_help=False)
    command.add_arguments(parser)
    return {
        action.dest: max(action.option_strings, key=lambda option: option[2:] == action.dest)
        if action.option_strings
        else action.dest
        for action in parser._actions
    }
