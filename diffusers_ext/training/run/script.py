"""How a script starts and ends: errors that a user can mend are one line, and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils.environment import get_int_from_env

from diffusers_ext.core.disk import folder_lock
from diffusers_ext.core.hub_connection import one_try_to_connect
from diffusers_ext.core.result_folder import check_no_result, remove_result, staged_output
from diffusers_ext.core.run_settings import ModelSettings, RunSettings
from diffusers_ext.core.settings import Settings, flag_name
from diffusers_ext.training.run.checkpoint_files import list_checkpoints, remove_checkpoint
from diffusers_ext.training.run.command_lines import (
    TRACEBACK_FLAG,
    WRONG_USAGE,
    error_line,
    user_errors,
)


__all__ = ["check_output_dir", "clear_output_dir", "one_run_a_folder", "staged_output"]

ReturnType = TypeVar("ReturnType")
# What runs draw on the way; besides checkpoints all that they write before the end.
ON_THE_WAY = ("validation/step-*",)
# By these a result that lists no files is known.
REPORTS = ("training_report.json", "report.json")
# Of trainings that listed no files.
_UNLISTED = (
    "training_report.json", "pytorch_lora_weights.safetensors", "adapter_config.json",
    "adapter_model.safetensors", "config.json", "diffusion_pytorch_model.safetensors",
    "statistics/config.json", "statistics/model.safetensors", "pipeline/**/*",
)  # fmt: skip
# Whoever starts processes tells them their number by one of these.
RANKS = ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"]


def one_run_a_folder(
    main: Callable[[Any], ReturnType],
) -> Callable[[Any], ReturnType]:
    """Let a script's `main` hold `--output_dir` while it runs; of several processes the first one does."""

    @functools.wraps(main)
    def held(settings: Any) -> ReturnType:
        if get_int_from_env(RANKS, 0) != 0:
            return main(settings)
        with folder_lock(settings.output_dir):
            return main(settings)

    return held


def check_output_dir(settings: ModelSettings, names: Sequence[str] = REPORTS) -> None:
    """Raise `ValueError` where `--output_dir` holds a result and nobody asked to replace it.

    Args:
        settings: of a script.
        names: files that tell of a result that lists no files.
    """
    if (
        not hasattr(settings, "resume_from_checkpoint")
        and Path(settings.output_dir, REPORTS[0]).is_file()
    ):
        raise ValueError(
            f"`output_dir` must not hold a trained model, got {settings.output_dir} with {REPORTS[0]}: a "
            "report would take its place. Choose another folder."
        )
    resumed = getattr(settings, "resume_from_checkpoint", None) is not None
    if resumed or settings.overwrite_output_dir:
        return
    hint = ""
    if hasattr(settings, "resume_from_checkpoint") and list_checkpoints(settings.output_dir):
        hint = " Pass `--resume_from_checkpoint latest` to train it further."
    check_no_result(settings.output_dir, names, hint=hint)


def clear_output_dir(settings: RunSettings) -> None:
    """With `--overwrite_output_dir`, remove what an earlier training left: result, pictures, checkpoints."""
    if not settings.overwrite_output_dir or settings.resume_from_checkpoint is not None:
        return
    folder = Path(settings.output_dir)
    unlisted = _UNLISTED if (folder / "training_report.json").is_file() else ()
    remove_result(folder, [*unlisted, *ON_THE_WAY])
    for checkpoint in list_checkpoints(folder):
        remove_checkpoint(checkpoint)


INTERRUPTED = 130
# Longer than launchers take to end the others when the first process has ended.
_PATIENCE = 3.0


def run_script(
    parse_args: Callable[[], Any],
    main: Callable[[Any], Any],
    settings_class: type[Settings] | None = None,
    failed: int = WRONG_USAGE,
) -> None:
    """Parse and run; `--traceback` shows where an error came from.

    Of several processes that fail alike the first one speaks: the others wait, and the launcher ends
    them. What fails in another one alone is told by that one.

    Args:
        parse_args: of the process's command line.
        main: of the script; takes what `parse_args` returns.
        settings_class: what `parse_args` returns, so that errors of its rules name flags.
        failed: exit code after an error of the user's; a command line that cannot be read has 2.

    Raises:
        SystemExit: with that code, or 130 after an interruption.
    """
    settings, said = argparse.Namespace(), io.StringIO()
    rank = get_int_from_env(RANKS, 0)
    try:
        with contextlib.redirect_stderr(said) if rank else contextlib.nullcontext():
            settings = parse_args()
        with one_try_to_connect():
            main(settings)
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
        names = {name: name for name in vars(settings)}
        if settings_class is not None:
            names |= {one.name: flag_name(one) for one in fields(settings_class)}
        flags = {name: f"--{flag}" for name, flag in names.items()}
        place = f"[process {rank}] " if rank else ""
        print(f"{place}error: {error_line(error, settings, flags)}", file=sys.stderr)
        raise SystemExit(failed) from None
