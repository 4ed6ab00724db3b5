"""Arguments of the script that makes noise pairs, and the rules for them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from training.argument_rules import check_values


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Which prompts and noises, and how golden noise is made."""
    group = parser.add_argument_group("pairs")
    group.add_argument("--prompt_file", help="text, one prompt a line, or csv")
    group.add_argument("--prompt_column", default="prompt", help="of a csv file")
    group.add_argument("--max_prompts", type=int, help="the first ones; all without it")
    group.add_argument("--output_size", type=int, help="pixels; the model's own without it")
    group.add_argument("--num_steps", type=int, default=1, help="more than 1 makes sequences")
    group.add_argument(
        "--redenoise_steps", type=int, default=10, help="the fewer, the further golden noise is"
    )
    group.add_argument("--w1", type=float, default=5.5, help="guidance of the step down")
    group.add_argument("--w2", type=float, default=1.0, help="guidance of the step up")
    group.add_argument("--noises_per_prompt", type=int, default=1, help="seeds a prompt")
    group.add_argument("--batch_size", type=int, default=8, help="pairs made at once")
    group.add_argument("--shard_size", type=int, default=256, help="pairs tried for one file")
    group.add_argument(
        "--legacy_inversion", action="store_true", help="the published form, off by one level"
    )


def add_filter_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pairs stay."""
    group = parser.add_argument_group("filter")
    group.add_argument(
        "--reward",
        default="hpsv2",
        help="hpsv2, pickscore, clip_score, or module:attribute (see training/plugins.py)",
    )
    group.add_argument("--reward_model", help="folder, file or Hub name of its weights")
    group.add_argument("--reward_version", help="e.g. v2.1 of hpsv2")
    group.add_argument("--margin", type=float, default=0.0, help="a pair stays if it gains more")
    group.add_argument(
        "--no_filter", action="store_true", help="keep all pairs; no pictures, no reward"
    )


def check_pair_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` for what can be seen to be wrong before a model is loaded."""
    counts = (
        "max_prompts", "output_size", "num_steps", "redenoise_steps", "noises_per_prompt",
        "batch_size", "shard_size", "num_inference_steps",
    )  # fmt: skip
    check_values(args, counts, "at least 1", lambda value: value >= 1)
    numbers = ("w1", "w2", "margin", "guidance_scale")
    check_values(args, numbers, "a finite number", math.isfinite)
    check_values(args, ["seed"], "from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
    check_values(args, ["output_dir"], "a folder", lambda value: not Path(value).is_file())
    if args.resume_from_checkpoint not in (None, "latest"):
        raise ValueError(
            "`resume_from_checkpoint` must be 'latest' for noise pairs, got "
            f"{args.resume_from_checkpoint!r}."
        )
