"""Argument groups of the script that trains erasers, and their rules."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from diffusers_ext.command_line.argument_parser import OneLineParser
from diffusers_ext.eraser.recipe import (
    LATENTS_SOURCES,
    LOSS_TYPES,
    REAL_MODEL_DEFAULTS,
    EraserTraining,
)
from training.argument_rules import check_training_arguments, check_values
from training.arguments import (
    add_hub_arguments,
    add_model_arguments,
    add_resume_argument,
    add_training_arguments,
)
from training.config_file import parse_arguments


AUTO_ANCHOR = "auto"
# What the command line calls a recipe's fields where the names differ.
_NAMES = {"rank": "eraser_rank", "weight_decay": "adam_weight_decay"}


def add_concept_arguments(parser: argparse.ArgumentParser) -> None:
    """What is erased, what takes its place, and what stays."""
    group = parser.add_argument_group("concept")
    group.add_argument("--target_concept", help="word or words to erase")
    group.add_argument(
        "--anchor_concept",
        help="word in its place, or 'auto': the preserved concept that the model tells least from it; the "
        "empty prompt without it",
    )
    group.add_argument("--prompts_file", help="prompts of the concept: text, one a line, or csv")
    group.add_argument("--prompt_column", default="prompt", help="of csv files")
    group.add_argument("--preserved_concepts_file", help="other concepts, one a line")
    group.add_argument(
        "--auto_preserved_concepts",
        action="store_true",
        help="take the text encoder's nearest words; they are shown and written to a file",
    )
    group.add_argument("--num_preserved_concepts", type=int, default=15, help="taken by itself")
    group.add_argument("--preserved_prompts_file", help="whole prompts to preserve besides")
    group.add_argument("--max_preserved_prompts", type=int, help="with a preserved concept")
    group.add_argument("--text_batch_size", type=int, default=8, help="prompts encoded at once")


def add_eraser_arguments(parser: argparse.ArgumentParser) -> None:
    """The adapter and its losses; defaults are those of real models."""
    group = parser.add_argument_group("eraser")
    group.add_argument("--eraser_rank", type=int, help="inner width of each eraser")
    group.add_argument("--guidance_scale", type=float, help="eta: how far past the anchor")
    group.add_argument(
        "--unlearning_weight", type=float, help="of the distance to the negatively guided velocity"
    )
    group.add_argument(
        "--preservation_weight",
        type=float,
        help="of the distance to the teacher on preserved prompts",
    )
    group.add_argument("--localization_weight", type=float, help="0 asks for no masks")
    group.add_argument("--mask_threshold", type=float, help="soft masks without it")
    group.add_argument("--loss_type", choices=LOSS_TYPES, help="of both distances")
    group.add_argument(
        "--rows_in_turn",
        action="store_true",
        help="target rows, then preserved rows: less memory, one more forward of the first",
    )
    group.add_argument("--preserved_share", type=float, help="of a step's rows")
    group.add_argument("--empty_share", type=float, help="of preserved rows: the empty prompt")
    group.add_argument("--empty_weight", type=float, help="of these rows")
    group.add_argument("--min_timestep", type=int, help="rows below do not count")
    group.add_argument("--max_timestep", type=int, help="rows above do not count")
    group.add_argument("--on_policy_share", type=float, help="of target rows: student's own states")
    group.add_argument("--on_policy_every", type=int, help="steps between the student's samplings")
    group.add_argument("--adversarial_share", type=float, help="of target rows: learned embeddings")
    group.add_argument("--adversarial_every", type=int, help="steps between the attacks for them")
    group.add_argument("--adversarial_steps", type=int, help="of each attack")
    group.add_argument("--num_adversarial_embeddings", type=int, help="learned by each attack")
    group.add_argument("--num_adversarial_sets", type=int, help="of the latest attacks are kept")


def add_latents_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the noisy latents come from."""
    group = parser.add_argument_group("latents")
    group.add_argument(
        "--latents_source", choices=LATENTS_SOURCES, help="where noisy latents come from"
    )
    group.add_argument("--video_dir", help="folder of clips for --latents_source video")
    for name in ("num_frames", "height", "width"):
        group.add_argument(f"--{name}", type=int, help="the model's own without it")
    group.add_argument(
        "--num_target_trajectories", type=int, help="clips sampled for target prompts"
    )
    group.add_argument(
        "--num_preserved_trajectories", type=int, help="clips sampled for preserved prompts"
    )
    group.add_argument("--points_per_trajectory", type=int, help="0 keeps all")
    group.add_argument("--num_inference_steps", type=int, help="of all sampling")
    group.add_argument("--sampling_guidance_scale", type=float, help="of all sampling")
    group.add_argument("--sampling_batch_size", type=int, help="clips sampled at once")
    group.add_argument("--trajectories_dir", help="keep the teacher's samples there")
    group.add_argument(
        "--trajectories_dtype", choices=["fp32", "fp16"], default="fp32", help="of kept samples"
    )


def add_eraser_reporting_arguments(parser: argparse.ArgumentParser) -> None:
    """Logs and validation clips."""
    group = parser.add_argument_group("reporting")
    group.add_argument("--report_to", help="tensorboard, wandb, ...; nothing without it")
    group.add_argument("--logging_dir", default="logs", help="below the output folder")
    group.add_argument("--logging_steps", type=int, default=10, help="steps between two log lines")
    group.add_argument("--validation_prompt", action="append", default=[], help="may be repeated")
    group.add_argument("--num_validation_videos", type=int, default=1, help="a prompt")
    group.add_argument("--validation_steps", type=int, help="only at the end without it")
    group.add_argument("--validation_fps", type=int, default=8, help="of the gif files")


ERASER_GROUPS = (
    add_model_arguments,
    add_training_arguments,
    add_resume_argument,
    add_hub_arguments,
    add_concept_arguments,
    add_eraser_arguments,
    add_latents_arguments,
    add_eraser_reporting_arguments,
)


def parse_eraser_arguments(
    description: str | None,
    input_args: Sequence[str] | None = None,
    other_groups: Sequence[Callable[[argparse.ArgumentParser], None]] = (),
) -> argparse.Namespace:
    """Command line of the script, over the YAML file of `--config`.

    Args:
        description: of the script.
        input_args: command line; `None` takes the process's.
        other_groups: of scripts that share the file.
    """
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for add_arguments in ERASER_GROUPS:
        add_arguments(parser)
    unset = ("max_train_steps", "train_batch_size", "adam_weight_decay", "lr_scheduler")
    parser.set_defaults(**dict.fromkeys(unset))
    required = (
        "pretrained_model_name_or_path", "target_concept", "prompts_file", "output_dir",
    )  # fmt: skip
    args = parse_arguments(parser, input_args, required, groups=(*ERASER_GROUPS, *other_groups))
    for name, value in REAL_MODEL_DEFAULTS.items():
        name = _NAMES.get(name, name)
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, value)
    return args


def recipe_of(args: argparse.Namespace) -> EraserTraining:
    """The recipe that the command line asks for."""
    names = {field.name: _NAMES.get(field.name, field.name) for field in fields(EraserTraining)}
    given = {field: getattr(args, name, None) for field, name in names.items()}
    values = {field: value for field, value in given.items() if value is not None}
    values["points_per_trajectory"] = args.points_per_trajectory or None
    return EraserTraining(**values)


def check_eraser_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` for a wrong argument of this script, before anything is loaded."""
    check_training_arguments(args)
    counts = (
        "text_batch_size", "num_preserved_concepts", "max_preserved_prompts",
        "num_validation_videos", "validation_fps", "eraser_rank",
    )  # fmt: skip
    check_values(args, counts, "at least 1", lambda value: value >= 1)
    check_values(args, ["target_concept", "anchor_concept"], "a word or words", str.strip)
    recipe_of(args)
    folder = args.video_dir
    if args.latents_source == "video" and (folder is None or not Path(folder).is_dir()):
        raise ValueError(
            f"`video_dir` must be a folder of clips for `--latents_source video`, got {folder}."
        )
    if args.latents_source != "trajectory" and args.trajectories_dir is not None:
        raise ValueError(
            "`trajectories_dir` must not be given with `--latents_source "
            f"{args.latents_source}`, which samples none, got {args.trajectories_dir}."
        )
    if args.preserved_concepts_file and args.auto_preserved_concepts:
        raise ValueError(
            "`preserved_concepts_file` must not be given with `--auto_preserved_concepts`, got both."
        )
    preserved = (
        args.preserved_concepts_file or args.preserved_prompts_file or args.auto_preserved_concepts
    )
    if args.preservation_weight and not preserved:
        raise ValueError(
            "One of `preserved_concepts_file`, `preserved_prompts_file` and "
            "`auto_preserved_concepts` must be given, got none. Name what the model must keep, or "
            "set `--preservation_weight 0` to keep nothing."
        )
