"""Validation pictures during the training of a subject."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image

from diffusers_ext.core.artifacts import CONFIG_NAME
from diffusers_ext.core.noise_schedules import check_min_snr, training_schedule
from diffusers_ext.core.pictures import read_picture
from diffusers_ext.nullspace.lora import check_lora_config
from diffusers_ext.nullspace.prompts import check_prompt_length
from diffusers_ext.nullspace.settings import NullSpaceSettings
from diffusers_ext.nullspace.slots import find_linears
from diffusers_ext.training.nullspace.captions import subject_prompts
from diffusers_ext.training.nullspace.pictures import (
    draw_images,
    list_images,
    own_resolution,
    sampling_arguments,
)
from diffusers_ext.training.run.knowledge import read_knowledge


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


class Validation:
    """Draws `--validation_prompt` at fixed seeds every `--validation_steps` and at the end.

    Attributes:
        files: pictures of the last call.
    """

    def __init__(
        self, args: NullSpaceSettings, pipeline: DiffusionPipeline, accelerator: Accelerator
    ) -> None:
        self.args, self.pipeline, self.accelerator = args, pipeline, accelerator
        self.files: list[Path] = []

    def callbacks(self) -> list[tuple[int, Callable[[int], None]]]:
        """What `TrainingLoop` calls; empty without validation prompts."""
        if not self.args.validation_prompt:
            return []
        return [(self.args.validation_steps or self.args.max_train_steps, self.draw)]

    def draw(self, step: int) -> None:
        """Draw and save the pictures of one step; the model's mode comes back afterwards."""
        if not self.accelerator.is_main_process:
            return
        folder = Path(self.args.output_dir, "validation")
        folder.mkdir(parents=True, exist_ok=True)
        self.files = []
        for index, prompt in enumerate(self.args.validation_prompt):
            images = self._images(prompt)
            self.files.append(folder / f"step-{step:06d}-prompt-{index}.png")
            _side_by_side(images).save(self.files[-1])
            self._track(prompt, images, step)

    def _images(self, prompt: str) -> list[Image.Image]:
        seeds = range(self.args.seed, self.args.seed + self.args.num_validation_images)
        return draw_images(
            self.pipeline,
            [prompt] * len(seeds),
            seeds,
            self.args.resolution,
            **sampling_arguments(self.args),
        )

    def _track(self, prompt: str, images: list[Image.Image], step: int) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                stacked = np.stack([np.asarray(image) for image in images])
                tracker.writer.add_images(prompt, stacked, step, dataformats="NHWC")


def _side_by_side(images: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet
