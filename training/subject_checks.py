"""What can be wrong with the command line of a subject, found before any long work."""

from __future__ import annotations

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
from diffusers_ext.nullspace.settings import NullSpaceSettings
from diffusers_ext.nullspace.slots import find_linears
from training.captions import subject_prompts
from training.drawing import own_resolution
from training.dreambooth import list_images
from training.knowledge import read_knowledge


logger = get_logger(__name__)


def check_adapter(args: NullSpaceSettings) -> None:
    """Raise `ValueError` for a LoRA that could not preserve anything."""
    check_lora_config(LoraConfig(use_dora=args.use_dora, bias=args.lora_bias))


def check_knowledge(args: NullSpaceSettings) -> None:
    """Raise `ValueError` where the directions need statistics and there is nothing to preserve."""
    if args.directions == "plain":
        return
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


def check_pictures(args: NullSpaceSettings) -> None:
    """Raise `ValueError` for pictures or captions that cannot be read."""
    for path in list_images(args.instance_data_dir):
        read_picture(path)
    subject_prompts(args)  # broken captions stop here


def check_against_model(args: NullSpaceSettings, pipeline: DiffusionPipeline) -> None:
    """Raise `ValueError` for arguments that do not fit the loaded model; settles `--resolution`."""
    settle_resolution(args, pipeline)
    check_min_snr(training_schedule(pipeline.scheduler), args.snr_gamma)
    prompts = [*subject_prompts(args), args.negative_prompt, *args.validation_prompt]
    if args.with_prior_preservation:
        prompts.append(args.class_prompt)
    if args.directions != "plain":
        prompts += args.other_instance_prompts
    if args.directions == "plain" or args.statistics is None:
        find_linears(pipeline.unet, args.features, args.cross_attention_layers)
    if args.directions != "plain" and args.statistics is None:
        prompts += read_knowledge(args)
    check_prompt_length(pipeline, prompts)


def settle_resolution(args: NullSpaceSettings, pipeline: DiffusionPipeline) -> None:
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


def subject_settings(args: NullSpaceSettings) -> dict[str, Any]:
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
        layers = args.cross_attention_layers
        settings.update(features=list(args.features), cross_attention_layers=layers)
    return settings
