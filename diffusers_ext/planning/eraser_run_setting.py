"""How an eraser is trained, by the names of the training script."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffusers_ext.eraser.recipe import LATENTS_SOURCES
from diffusers_ext.planning.setting_checks import check_counts, check_precision


STORAGE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_COUNTS = (
    "max_train_steps", "gradient_accumulation_steps", "num_prompts", "num_target_trajectories",
    "num_preserved_trajectories", "num_inference_steps", "points_per_trajectory",
    "sampling_batch_size", "text_batch_size", "validation_steps", "checkpointing_steps", "checkpoints_total_limit",
)  # fmt: skip


@dataclass(frozen=True)
class EraserRunSetting:
    """How an eraser is trained, by the names of the training script.

    Attributes:
        rank: of the eraser.
        num_frames, height, width: of the clips; the model's own when `None`.
        target_rows, preserved_rows: of one micro-step.
        rows_in_turn: target rows, then preserved rows go through the models.
        gradient_checkpointing: blocks are computed again for their gradients.
        localization: masks are made and used.
        latents_source: `"trajectory"`, `"video"` or `"noise"`; the last two ask the teacher in each step.
        sampling_batch_size: clips that the teacher samples at once.
        text_batch_size: prompts encoded at once.
        validation: clips are decoded in the course of training.
        mixed_precision: `"no"`, `"fp16"` or `"bf16"`.
        max_train_steps: optimizer steps.
        gradient_accumulation_steps: batches of a step.
        num_prompts: encoded in all.
        num_target_trajectories, num_preserved_trajectories: clips that the teacher samples.
        points_per_trajectory: states kept of each.
        num_inference_steps: of a clip.
        trajectories_dtype: `"fp32"` or `"fp16"`, of the kept states.
        validation_steps: steps between two validation clips; only at the end when `None`.
        checkpointing_steps: steps between two checkpoints; none are written when `None`.
        checkpoints_total_limit: how many are kept; all when `None`.
    """

    rank: int = 128
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    target_rows: int = 1
    preserved_rows: int = 1
    rows_in_turn: bool = False
    gradient_checkpointing: bool = True
    localization: bool = False
    latents_source: str = "trajectory"
    sampling_batch_size: int = 1
    text_batch_size: int = 8
    validation: bool = False
    mixed_precision: str = "bf16"
    max_train_steps: int = 500
    gradient_accumulation_steps: int = 1
    num_prompts: int = 64
    num_target_trajectories: int = 16
    num_preserved_trajectories: int = 32
    points_per_trajectory: int = 16
    num_inference_steps: int = 50
    trajectories_dtype: str = "fp32"
    validation_steps: int | None = None
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int | None = None

    def __post_init__(self) -> None:
        check_precision(self.mixed_precision)
        if self.latents_source not in LATENTS_SOURCES:
            raise ValueError(
                f"`latents_source` must be one of {LATENTS_SOURCES}, got {self.latents_source!r}."
            )
        check_counts(self, _COUNTS)
        check_counts(self, ("target_rows", "preserved_rows"), least=0)
        if not self.target_rows + self.preserved_rows:
            raise ValueError("`target_rows` and `preserved_rows` must not both be 0.")
        if self.trajectories_dtype not in STORAGE_DTYPES:
            raise ValueError(
                f"`trajectories_dtype` must be one of {list(STORAGE_DTYPES)}, got "
                f"{self.trajectories_dtype!r}."
            )
