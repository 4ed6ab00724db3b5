"""Validation pictures during the training of a subject."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.nullspace.settings import NullSpaceSettings
from training.drawing import draw_images, sampling_arguments


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
