"""What can be wrong with the command line of a subject, found before any long work."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from peft import LoraConfig

from diffusers_ext.core.artifacts import CONFIG_NAME
from diffusers_ext.core.noise_schedules import check_min_snr, training_schedule
from diffusers_ext.core.pictures import read_picture
from diffusers_ext.nullspace.lora_config import check_lora_config
from diffusers_ext.nullspace.prompts import check_prompt_length
from diffusers_ext.nullspace.slots import check_features, find_linears
from training.argument_rules import check_values
from training.arguments import read_layers
from training.captions import subject_prompts
from training.drawing import own_resolution
from training.dreambooth import list_images
from training.knowledge import read_knowledge


logger = get_logger(__name__)


def check_null_space_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` for wrong arguments of the knowledge and null-space groups."""
    check_lora_config(LoraConfig(use_dora=args.use_dora, bias=args.lora_bias))
    counts = ("rank", "statistics_batch_size")
    check_values(args, counts, "at least 1", lambda value: value >= 1)
    positive = ("eps", "nullspace_threshold")
    check_values(args, positive, "positive", lambda value: 0 < value < math.inf)
    shares = ("null_energy", "lora_dropout")
    check_values(args, shares, "in [0, 1)", lambda value: 0 <= value < 1)
    rule, weights = "at least 0", ("preservation_weight", "prior_loss_weight")
    check_values(args, weights, rule, lambda value: 0 <= value < math.inf)
    check_features(args.features)
    read_layers(args.cross_attention_layers)
    if args.full_finetune and args.directions == "plain":
        raise ValueError("`--full_finetune` must be constrained, got `--directions plain`.")
    if args.full_finetune and args.adam_weight_decay:
        raise ValueError(
            f"`adam_weight_decay` must be 0 with `--full_finetune`, got {args.adam_weight_decay}: it "
            "pulls the pretrained weights themselves towards zero."
        )
    if args.directions != "plain":
        _check_knowledge(args)


def _check_knowledge(args: argparse.Namespace) -> None:
    if args.statistics is None:
        if not read_knowledge(args):
            raise ValueError(
                "`--statistics` or `--knowledge_prompts` must be given: what should be preserved?"
            )
    elif Path(args.statistics).is_dir() and not Path(args.statistics, CONFIG_NAME).is_file():
        raise ValueError(
            f"`statistics` must be a folder with {CONFIG_NAME}, got {args.statistics} without it. "
            "training/build_covariance.py writes one."
        )


def check_subject_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` for wrong arguments of the subject group, its pictures included."""
    if not args.instance_prompt.strip():
        raise ValueError(f"`instance_prompt` must not be empty, got {args.instance_prompt!r}.")
    check_values(
        args, ["resolution"], "a multiple of 8", lambda value: value >= 8 and value % 8 == 0
    )
    check_values(args, ["num_class_images"], "at least 1", lambda value: value >= 1)
    check_values(args, ["snr_gamma"], "positive", lambda value: 0 < value < math.inf)
    for path in list_images(args.instance_data_dir):
        read_picture(path)
    subject_prompts(args)  # broken captions stop here
    if args.with_prior_preservation and not (args.class_data_dir and args.class_prompt):
        raise ValueError(
            "`--class_data_dir` and `--class_prompt` must be given with `--with_prior_preservation`."
        )
    if args.with_prior_preservation and Path(args.class_data_dir).is_file():
        raise ValueError(f"`class_data_dir` must be a folder, got the file {args.class_data_dir}.")
    if Path(args.instance_data_dir).resolve() == Path(args.output_dir).resolve():
        raise ValueError(
            f"`output_dir` must not be the folder of the pictures, got {args.output_dir} for both."
        )


def check_against_model(args: argparse.Namespace, pipeline: DiffusionPipeline) -> None:
    """Raise `ValueError` for arguments that do not fit the loaded model; settles `--resolution`."""
    settle_resolution(args, pipeline)
    check_min_snr(training_schedule(pipeline.scheduler), args.snr_gamma)
    prompts = [*subject_prompts(args), args.negative_prompt, *args.validation_prompt]
    if args.with_prior_preservation:
        prompts.append(args.class_prompt)
    if args.directions != "plain":
        prompts += args.other_instance_prompts
    if args.directions == "plain" or args.statistics is None:
        find_linears(pipeline.unet, args.features, read_layers(args.cross_attention_layers))
    if args.directions != "plain" and args.statistics is None:
        prompts += read_knowledge(args)
    check_prompt_length(pipeline, prompts)


def settle_resolution(args: argparse.Namespace, pipeline: DiffusionPipeline) -> None:
    """Make `--resolution` the model's own where it is not given; warn where it is another.

    Raises:
        ValueError: not given, and the model has no one size of its own.
    """
    own = own_resolution(pipeline)
    if args.resolution is None:
        if own is None:
            raise ValueError(
                "`resolution` must be given for a model without a square size of its own, got None."
            )
        args.resolution = own
    elif own is not None and args.resolution != own:
        logger.warning(
            f"--resolution is {args.resolution}, the model's own is {own}: pictures of another size "
            "take another time to train on and may be drawn worse. Leave the flag out for the "
            "model's own."
        )


def subject_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that, beside those of every training, decide what comes out."""
    names = (
        "instance_prompt", "resolution", "no_center_crop", "random_flip", "snr_gamma",
        "with_prior_preservation", "directions", "rank", "eps", "null_energy",
        "nullspace_threshold", "preservation_weight", "lora_dropout", "full_finetune",
        "gradient_checkpointing", "allow_tf32",
    )  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    if args.resolution is None:  # the model's own, which is not known before it is loaded
        del settings["resolution"]
    if args.with_prior_preservation:
        settings.update(class_prompt=args.class_prompt, prior_loss_weight=args.prior_loss_weight)
    if args.directions == "plain":
        layers = read_layers(args.cross_attention_layers)
        settings.update(features=list(args.features), cross_attention_layers=layers)
    return settings
