"""Validation pictures during a run, and the upload of its result with a model card."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard, ModelCardData
from PIL import Image

from diffusers_ext.nullspace.statistics import FeatureStatistics
from hub_cards import render
from training.drawing import draw_images, sampling_arguments


logger = get_logger(__name__)


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


def make_repository(args: argparse.Namespace) -> str:
    """The repository of `--hub_model_id`, made when absent; returns its full name."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    api = HfApi(token=args.hub_token)
    return api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id


def subject_card(args: argparse.Namespace, repo_id: str, pictures: Sequence[Path]) -> ModelCard:
    """The card of a trained subject, without network.

    Args:
        args: of the training script.
        repo_id: where the card is going to be.
        pictures: one per validation prompt, below the output folder.
    """
    widget = [
        {"text": prompt, "output": {"url": path.relative_to(args.output_dir).as_posix()}}
        for prompt, path in zip(args.validation_prompt, pictures)
    ]
    tags = ["text-to-image", "diffusers", "diffusers-training", "dreambooth"]
    if not args.full_finetune:
        tags += ["lora"] if args.directions == "plain" else ["lora", "null-space-lora"]
    data = card_data(args, tags, instance_prompt=args.instance_prompt, widget=widget or None)
    return render(
        "subject_pipeline" if args.full_finetune else "subject_lora",
        data,
        base=args.pretrained_model_name_or_path,
        repo_id=repo_id,
        instance_prompt=args.instance_prompt,
        directions=args.directions,
        rank=args.rank,
    )


def statistics_card(
    args: argparse.Namespace, repo_id: str, statistics: FeatureStatistics
) -> ModelCard:
    """The card of collected statistics, without network."""
    return render(
        "feature_statistics",
        card_data(args, ["diffusers", "feature-statistics", "null-space-lora"]),
        base=args.pretrained_model_name_or_path,
        repo_id=repo_id,
        num_prompts=len(statistics.facts["prompts"]),
    )


def card_data(args: argparse.Namespace, tags: list[str], **entries: Any) -> ModelCardData:
    """The header of a card; `entries` are further ones."""
    base = args.pretrained_model_name_or_path
    return ModelCardData(
        license="other",
        library_name="diffusers",
        base_model=None if Path(base).exists() else base,  # the Hub refuses what is not on it
        tags=tags,
        **entries,
    )


def publish(args: argparse.Namespace, pipeline: DiffusionPipeline, pictures: list[Path]) -> str:
    """Upload the output folder of a training (weights, statistics, report, card, last pictures).

    Checkpoints, logs and the pictures that were trained on stay here. A pipeline comes to the root
    of the repository, where `from_pretrained` looks for it.

    Returns:
        Address of the commit.
    """
    repo_id = make_repository(args)
    ignored = ["checkpoint-*", ".partial-*", f"{args.logging_dir}/*", "class_*"]
    ignored += patterns_below(args.output_dir, args.instance_data_dir, args.class_data_dir)
    if args.full_finetune:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=repo_id,
            folder_path=Path(args.output_dir, "pipeline"),
            commit_message="Upload pipeline",
        )
        ignored.append("pipeline/*")
    return upload_output(args, subject_card(args, repo_id, pictures), repo_id, ignored)


def publish_statistics(args: argparse.Namespace, statistics: FeatureStatistics) -> str:
    """Upload the output folder of a collection (statistics, report, plots, card).

    Returns:
        Address of the commit.
    """
    repo_id = make_repository(args)
    return upload_output(
        args, statistics_card(args, repo_id, statistics), repo_id, [".*", "progress/*"]
    )


def patterns_below(output_dir: str, *folders: str | None) -> list[str]:
    """Patterns for all files of those folders that lie in the output folder."""
    root = Path(output_dir).resolve()
    below = [Path(folder).resolve() for folder in folders if folder is not None]
    return [f"{f.relative_to(root).as_posix()}/*" for f in below if f.is_relative_to(root)]


def upload_output(
    args: argparse.Namespace, card: ModelCard, repo_id: str, ignored: list[str]
) -> str:
    """Write the card and upload the output folder but for some patterns; returns the commit."""
    card.save(Path(args.output_dir, "README.md"))
    commit = HfApi(token=args.hub_token).upload_folder(
        repo_id=repo_id,
        folder_path=args.output_dir,
        commit_message="Upload results of the training scripts",
        ignore_patterns=ignored,
    )
    logger.info(f"Uploaded to {commit}")
    return str(commit)
