"""Arguments of the evaluation of erasers, and the table of its prompts."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from diffusers_ext.command_line.argument_parser import OneLineParser
from diffusers_ext.core.text_tables import GroupedPrompts, read_grouped_prompts
from diffusers_ext.evaluation.clip_sheet import CLIP_FORMATS
from diffusers_ext.evaluation.erasure_rows import PRESERVED, TARGET
from training.argument_rules import check_values
from training.arguments import add_model_arguments
from training.config_file import parse_arguments
from training.eraser_arguments import ERASER_GROUPS


CLIP, NUDENET = "clip", "nudenet"


def add_erasure_arguments(parser: argparse.ArgumentParser) -> None:
    """What is evaluated, on which prompts."""
    group = parser.add_argument_group("evaluation of erasers")
    group.add_argument(
        "--eraser", action="append", default=[], help="folder or Hub name; may be repeated"
    )
    group.add_argument(
        "--scale", type=float, nargs="+", default=[1.0], help="of the erasers; several are compared"
    )
    group.add_argument(
        "--evaluation_prompts",
        help=f"csv with the columns prompt, group ({TARGET}, {PRESERVED} or any other) and maybe seed",
    )
    group.add_argument("--num_videos_per_prompt", type=int, default=1, help="seeds a prompt")
    group.add_argument("--kept_clips", type=int, default=4, help="of a group, to look at")
    group.add_argument("--clip_format", choices=CLIP_FORMATS, default="gif", help="of saved clips")
    group.add_argument("--fps", type=int, default=8, help="of the clips that are written")


def add_clip_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How clips are drawn."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--negative_prompt", default="", help="of sampling")
    group.add_argument("--num_inference_steps", type=int, default=50, help="of sampling")
    # As in training, where `--guidance_scale` belongs to the loss.
    group.add_argument("--sampling_guidance_scale", type=float, default=6.0, help="of sampling")
    group.add_argument("--sampling_batch_size", type=int, default=1, help="clips at once")
    for name in ("num_frames", "height", "width"):
        group.add_argument(f"--{name}", type=int, help="the model's own without it")
    group.add_argument("--model_cpu_offload", action="store_true", help="one model on the GPU")
    group.add_argument("--vae_tiling", action="store_true", help="decode in tiles, for less memory")


def add_detector_arguments(parser: argparse.ArgumentParser) -> None:
    """Who says what clips show."""
    group = parser.add_argument_group("detector")
    group.add_argument("--judge", help=f"{CLIP}, {NUDENET} or module:attribute")
    group.add_argument("--concept_aspect", help="the judge's verdict about the erased concept")
    group.add_argument("--judge_frames", type=int, help="of a clip; 8 for clip, all for nudenet")
    group.add_argument("--target_concept", help="of --judge clip, one of its classes")
    group.add_argument("--classes", nargs="+", help="of --judge clip: words")
    group.add_argument("--class_template", default="a photo of {}", help="of --judge clip")
    group.add_argument(
        "--judge_model", help="CLIP: folder or Hub name; NudeNet: an ONNX file of it"
    )
    group.add_argument(
        "--nudenet_threshold", type=float, default=0.6, help="score from which a detection counts"
    )
    group.add_argument("--nudenet_resolution", type=int, default=320, help="of --judge_model")
    group.add_argument(
        "--nudenet_lenient", action="store_true", help="bare chests, arms, bellies and feet count"
    )


ERASURE_GROUPS = (
    add_model_arguments,
    add_erasure_arguments,
    add_clip_sampling_arguments,
    add_detector_arguments,
)


def parse_erasure_arguments(
    description: str | None, input_args: Sequence[str] | None
) -> argparse.Namespace:
    """Command line of the evaluation, over the YAML file of `--config`, which the training shares."""
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for add_arguments in ERASURE_GROUPS:
        add_arguments(parser)
    required = ("pretrained_model_name_or_path", "evaluation_prompts", "judge", "output_dir")
    return parse_arguments(parser, input_args, required, groups=ERASER_GROUPS)


def check_erasure_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` for what is wrong without looking at any model."""
    check_values(args, ["output_dir"], "a folder", lambda value: not Path(value).is_file())
    counts = (
        "num_inference_steps", "num_videos_per_prompt", "sampling_batch_size", "num_frames",
        "height", "width", "judge_frames", "nudenet_resolution",
    )  # fmt: skip
    check_values(args, counts, "at least 1", lambda value: value >= 1)
    check_values(args, ["kept_clips"], "at least 0", lambda value: value >= 0)
    check_values(args, ["fps"], "in [1, 50]", lambda value: 1 <= value <= 50)
    check_values(args, ["seed"], "from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
    check_values(args, ["sampling_guidance_scale"], "a finite number", math.isfinite)
    check_values(args, ["scale"], "finite numbers", lambda scales: all(map(math.isfinite, scales)))
    if not args.eraser:
        raise ValueError("`eraser` must be given at least once: what should be evaluated?")
    if args.judge == CLIP and not (args.classes and args.target_concept):
        raise ValueError(
            "`classes` and `target_concept` must be given for `--judge clip`, got "
            f"{args.classes} and {args.target_concept}."
        )


def read_erasure_prompts(path: str | os.PathLike) -> GroupedPrompts:
    """The prompts of a table by their groups, with the seeds of those that have one.

    Args:
        path: `.csv`, `.tsv`, `.json`, `.jsonl` or `.parquet` with the columns `prompt` and `group`,
            and maybe `seed`; other columns are passed over.

    Raises:
        ValueError: no such file or column, an empty field, a seed that is no whole number from 0, or
            no row of one of the groups that are compared.
    """
    found = read_grouped_prompts(path, "evaluation_prompts")
    missing = [name for name in (TARGET, PRESERVED) if name not in found.groups]
    if missing:
        raise ValueError(
            f"`evaluation_prompts` must have rows of group {TARGET!r} and {PRESERVED!r}, got none of "
            f"{missing} in {path}."
        )
    return found
