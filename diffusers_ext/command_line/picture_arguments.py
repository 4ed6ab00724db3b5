"""How the pictures of an evaluation are drawn."""

from __future__ import annotations

import argparse
from typing import Any


COUNTS = ("num_inference_steps", "num_images_per_prompt", "batch_size", "height", "width")


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """The sampling group of an evaluation of pictures."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--negative_prompt", default="")
    group.add_argument("--num_inference_steps", type=int, default=50)
    group.add_argument("--guidance_scale", type=float, default=7.5)
    group.add_argument("--num_images_per_prompt", type=int, default=4)
    group.add_argument("--batch_size", type=int, default=8, help="pictures at once")
    group.add_argument("--height", type=int, help="the model's own without it")
    group.add_argument("--width", type=int, help="the model's own without it")
    group.add_argument("--sheet_prompts", type=int, default=16, help="rows of the picture sheet")


def picture_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The same as arguments of an evaluation."""
    names = (*COUNTS, "guidance_scale", "sheet_prompts", "seed")
    return {
        **{name: getattr(args, name) for name in names},
        # Not the empty string: SDXL reads zeros in place of a prompt that is not given.
        "negative_prompt": args.negative_prompt or None,
        "show_progress": not args.quiet,
    }
