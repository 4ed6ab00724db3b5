"""Validation pictures during a run, and the upload of its result with a model card."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import HfApi
from PIL import Image


logger = get_logger(__name__)

_TAGS = [
    "text-to-image",
    "diffusers",
    "diffusers-training",
    "lora",
    "dreambooth",
    "null-space-lora",
]


class Validation:
    """Draws `--validation_prompt` at fixed seeds every `--validation_steps` and at the end.

    Attributes:
        files: pictures of the last call.
    """

    def __init__(
        self, args: argparse.Namespace, pipeline: DiffusionPipeline, accelerator: Accelerator
    ) -> None:
        self.args, self.pipeline, self.accelerator = args, pipeline, accelerator
        self.files: list[Path] = []

    def callbacks(self) -> list[tuple[int, Callable[[int], None]]]:
        """What `TrainingLoop` calls; empty without validation prompts."""
        if not self.args.validation_prompt:
            return []
        return [(self.args.validation_steps or self.args.max_train_steps, self.draw)]

    @torch.no_grad()
    def draw(self, step: int) -> None:
        """Draw and save the pictures of one step; the model's mode comes back afterwards."""
        if not self.accelerator.is_main_process:
            return
        folder = Path(self.args.output_dir, "validation")
        folder.mkdir(exist_ok=True)
        unet, training = self.pipeline.unet, self.pipeline.unet.training
        unet.eval()
        self.files = []
        try:
            for index, prompt in enumerate(self.args.validation_prompt):
                images = self._images(prompt)
                self.files.append(folder / f"step-{step:06d}-prompt-{index}.png")
                _side_by_side(images).save(self.files[-1])
                self._track(prompt, images, step)
        finally:
            unet.train(training)

    def _images(self, prompt: str) -> list[Image.Image]:
        seeds = range(self.args.seed, self.args.seed + self.args.num_validation_images)
        with torch.autocast(
            self.accelerator.device.type, enabled=self.args.mixed_precision != "no"
        ):
            return self.pipeline(
                [prompt] * len(seeds),
                height=self.args.resolution,
                width=self.args.resolution,
                num_inference_steps=self.args.num_inference_steps,
                guidance_scale=self.args.guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images

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


def publish(args: argparse.Namespace, pipeline: DiffusionPipeline, pictures: list[Path]) -> str:
    """Upload the output folder (weights, statistics, report, card, last pictures).

    Returns:
        Address of the commit.
    """
    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or Path(args.output_dir).name
    repo_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    widget = [
        {"text": prompt, "output": {"url": str(path.relative_to(args.output_dir))}}
        for prompt, path in zip(args.validation_prompt, pictures)
    ]
    card = load_or_create_model_card(
        repo_id_or_path=repo_id,
        from_training=True,
        license="other",
        base_model=args.pretrained_model_name_or_path,
        prompt=args.instance_prompt,
        model_description=(
            f"LoRA weights for {args.pretrained_model_name_or_path}, trained on the prompt "
            f"`{args.instance_prompt}` with `{args.directions}` directions of rank {args.rank}. "
            "They load with `load_lora_weights` of diffusers."
        ),
        widget=widget or None,
    )
    populate_model_card(card, tags=_TAGS).save(Path(args.output_dir, "README.md"))
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=args.output_dir,
        commit_message="Upload null-space LoRA",
        ignore_patterns=["checkpoint-*", ".partial-*", f"{args.logging_dir}/*", "class_*"],
    )
    logger.info(f"Uploaded to {commit}")
    return str(commit)
