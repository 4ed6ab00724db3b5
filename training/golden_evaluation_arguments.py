"""Arguments of the evaluation of golden noise."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from diffusers_ext.command_line.argument_parser import OneLineParser
from training.argument_rules import check_values
from training.arguments import add_model_arguments, add_sampling_arguments
from training.config_file import parse_arguments
from training.golden_noise_arguments import PAIR_GROUPS, SEQUENCE_GROUPS, read_aliases
from training.pair_arguments import add_filter_arguments, add_pair_arguments


def add_golden_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, on which prompts and by which rewards."""
    group = parser.add_argument_group("evaluation of golden noise")
    group.add_argument(
        "--base_model_id",
        dest="pretrained_model_name_or_path",
        help="the same as --pretrained_model_name_or_path",
    )
    group.add_argument(
        "--noise_model",
        "--npnet_weights_path",
        action="append",
        default=[],
        help="folder, Hub name, or NPNet's single file; may be repeated",
    )
    group.add_argument("--golden_noise_scale", type=float, default=1.0, help="of the networks")
    group.add_argument("--prompt_file", help="text or csv file, one prompt a line")
    group.add_argument("--prompt_column", default="prompt", help="of a csv file")
    group.add_argument("--max_prompts", type=int, help="only the first so many")
    group.add_argument("--num_images_per_prompt", type=int, default=4, help="seeds a prompt")
    group.add_argument("--best_of", type=int, default=4, help="random noises; 1 for no comparison")
    group.add_argument("--batch_size", type=int, default=8, help="pictures at once")
    group.add_argument("--height", type=int, help="the model's own without it")
    group.add_argument("--width", type=int, help="the model's own without it")
    group.add_argument("--save_images", action="store_true", help="all pictures, under images/")
    group.add_argument("--sheet_prompts", type=int, default=16, help="rows of the picture sheet")


def add_reward_arguments(parser: argparse.ArgumentParser) -> None:
    """By what pictures are judged."""
    group = parser.add_argument_group("rewards")
    group.add_argument(
        "--reward",
        action="append",
        default=[],
        help="hpsv2, pickscore, clip_score or module:attribute; may be repeated, the first decides",
    )
    group.add_argument(
        "--reward_model",
        action="append",
        default=[],
        help="REWARD=folder, file or Hub name; of a single reward without REWARD=",
    )
    group.add_argument(
        "--reward_version", action="append", default=[], help="the same for v2.1 etc."
    )
    group.add_argument("--dino", help="DINOv2 for the diversity: folder or Hub name")
    group.add_argument("--clip", help="CLIP for the diversity; small pixels without either")


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """The re-denoised targets that networks learn."""
    group = parser.add_argument_group("re-denoised targets")
    group.add_argument(
        "--target_steps",
        type=int,
        action="append",
        default=[],
        help="also evaluate the noise re-denoised so often; may be repeated",
    )
    group.add_argument("--redenoise_steps", type=int, default=10, help="the fewer, the stronger")
    group.add_argument("--w1", type=float, default=5.5, help="guidance of the step down")
    group.add_argument("--w2", type=float, default=1.0, help="guidance of the step up")
    group.add_argument("--legacy_inversion", action="store_true", help="the published form")


GOLDEN_EVALUATION_GROUPS = (
    add_model_arguments,
    add_sampling_arguments,
    add_golden_evaluation_arguments,
    add_reward_arguments,
    add_target_arguments,
)


def parse_golden_evaluation_arguments(
    description: str | None, input_args: Sequence[str] | None
) -> argparse.Namespace:
    """Command line of the evaluation, over the YAML file of `--config`."""
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for add_arguments in GOLDEN_EVALUATION_GROUPS:
        add_arguments(parser)
    return parse_arguments(
        parser,
        input_args,
        ("pretrained_model_name_or_path", "prompt_file", "output_dir"),
        read_aliases,
        (*PAIR_GROUPS, *SEQUENCE_GROUPS, add_pair_arguments, add_filter_arguments),
    )


def check_golden_evaluation_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` for what is wrong without looking at any model."""
    check_values(args, ["output_dir"], "a folder", lambda value: not Path(value).is_file())
    counts = (
        "num_inference_steps", "num_images_per_prompt", "batch_size", "best_of", "max_prompts",
        "height", "width",
    )  # fmt: skip
    check_values(args, counts, "at least 1", lambda value: value >= 1)
    check_values(args, ["redenoise_steps"], "at least 2", lambda value: value >= 2)
    numbers = ("w1", "w2", "guidance_scale", "golden_noise_scale")
    check_values(args, numbers, "a finite number", math.isfinite)
    check_values(args, ["sheet_prompts"], "at least 0", lambda value: value >= 0)
    check_values(args, ["seed"], "from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
    check_values(
        args, ["target_steps"], "at least 1 each", lambda steps: all(step >= 1 for step in steps)
    )
    if not args.noise_model and not args.target_steps:
        raise ValueError("`noise_model` or `target_steps` must be given: what should be evaluated?")
    if not args.reward:
        raise ValueError("`reward` must be given at least once: what makes a picture better?")
    if args.dino and args.clip:
        raise ValueError("`dino` must not be given together with `clip`.")


def by_reward(args: argparse.Namespace, name: str) -> dict[str, str]:
    """`{reward: value}` of a repeated `REWARD=value`; a single reward needs no `REWARD=`.

    Raises:
        ValueError: another form, or a value for no reward or for one twice.
    """
    found: dict[str, str] = {}
    for entry in getattr(args, name):
        reward, equals, value = entry.partition("=")
        if reward not in args.reward and len(args.reward) == 1:
            reward, equals, value = args.reward[0], "=", entry
        if not (equals and value) or reward not in args.reward or reward in found:
            raise ValueError(
                f"`{name}` must be REWARD=value, once for each of {args.reward}, got {entry!r}."
            )
        found[reward] = value
    return found
