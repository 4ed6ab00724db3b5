"""How a script starts and ends: errors that a user can mend are one line, and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from accelerate.utils.environment import get_int_from_env

from diffusers_ext.command_line.argument_parser import TRACEBACK_FLAG, WRONG_USAGE
from diffusers_ext.command_line.user_errors import error_line, user_errors
from diffusers_ext.core.hub_connection import one_try_to_connect
from diffusers_ext.core.settings import Settings, flag_name
from training.output_folder import RANKS


INTERRUPTED = 130
# Longer than launchers take to end the others when the first process has ended.
_PATIENCE = 3.0


def run_script(
    parse_args: Callable[[], Any],
    main: Callable[[Any], Any],
    settings_class: type[Settings] | None = None,
) -> None:
    """Parse and run; `--traceback` shows where an error came from.

    Of several processes that fail alike the first one speaks: the others wait, and the launcher ends
    them. What fails in another one alone is told by that one.

    Args:
        parse_args: of the process's command line.
        main: of the script; takes what `parse_args` returns.
        settings_class: what `parse_args` returns, so that errors of its rules name flags.

    Raises:
        SystemExit: with code 2 after an error of the user's, 130 after an interruption.
    """
    args, said = argparse.Namespace(), io.StringIO()
    rank = get_int_from_env(RANKS, 0)
    try:
        with contextlib.redirect_stderr(said) if rank else contextlib.nullcontext():
            args = parse_args()
        with one_try_to_connect():
            main(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (SystemExit, *user_errors()) as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        if rank:
            time.sleep(_PATIENCE)
        if isinstance(error, SystemExit):  # of the parser, after its line
            sys.stderr.write(said.getvalue())
            raise
        if TRACEBACK_FLAG in sys.argv[1:]:
            traceback.print_exc()
        names = {name: name for name in vars(args)}
        if settings_class is not None:
            names = {one.name: flag_name(one) for one in fields(settings_class)}
        flags = {name: f"--{flag}" for name, flag in names.items()}
        place = f"[process {rank}] " if rank else ""
        print(f"{place}error: {error_line(error, args, flags)}", file=sys.stderr)
        raise SystemExit(WRONG_USAGE) from None
