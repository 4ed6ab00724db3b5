"""Where a command writes: no result is replaced unasked, and one command at a time writes to a folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers_ext.command_line.command import Command


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
