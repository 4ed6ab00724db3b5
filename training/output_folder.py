"""The output folder of a script: held by one run, free of finished results, or cleared on request."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from accelerate.utils.environment import get_int_from_env

from diffusers_ext.core.folder_lock import folder_lock
from diffusers_ext.core.result_folder import check_no_result, remove_result, staged_output
from training.checkpoint_folders import list_checkpoints, remove_checkpoint


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
    main: Callable[[argparse.Namespace], ReturnType],
) -> Callable[[argparse.Namespace], ReturnType]:
    """Let a script's `main` hold `--output_dir` while it runs; of several processes the first one does."""

    @functools.wraps(main)
    def held(args: argparse.Namespace) -> ReturnType:
        if get_int_from_env(RANKS, 0) != 0:
            return main(args)
        with folder_lock(args.output_dir):
            return main(args)

    return held


def check_output_dir(args: argparse.Namespace, names: Sequence[str] = REPORTS) -> None:
    """Raise `ValueError` where `--output_dir` holds a result and nobody asked to replace it.

    Args:
        args: of a script.
        names: files that tell of a result that lists no files.
    """
    if not hasattr(args, "resume_from_checkpoint") and Path(args.output_dir, REPORTS[0]).is_file():
        raise ValueError(
            f"`output_dir` must not hold a trained model, got {args.output_dir} with {REPORTS[0]}: a "
            "report would take its place. Choose another folder."
        )
    resumed = getattr(args, "resume_from_checkpoint", None) is not None
    if resumed or args.overwrite_output_dir:
        return
    hint = ""
    if hasattr(args, "resume_from_checkpoint") and list_checkpoints(args.output_dir):
        hint = " Pass `--resume_from_checkpoint latest` to train it further."
    check_no_result(args.output_dir, names, hint=hint)


def clear_output_dir(args: argparse.Namespace) -> None:
    """With `--overwrite_output_dir`, remove what an earlier training left: result, pictures, checkpoints."""
    if not args.overwrite_output_dir or args.resume_from_checkpoint is not None:
        return
    folder = Path(args.output_dir)
    unlisted = _UNLISTED if (folder / "training_report.json").is_file() else ()
    remove_result(folder, [*unlisted, *ON_THE_WAY])
    for checkpoint in list_checkpoints(folder):
        remove_checkpoint(checkpoint)
