"""A tiny CogVideoX on disk with an eraser for it, and detectors of its clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft import inject_adapter_in_model

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.model import register_eraser
from diffusers_ext.eraser.files import save_eraser
from tests.tiny_cogvideox import tiny_video_pipeline


class RedJudge:
    """Whether red is the strongest colour."""

    name, version, concept_aspect = "red", "2", "red"

    def correct(self, clips: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
        """Two verdicts on clips `(n, frames, height, width, 3)`."""
        means = clips.mean(axis=(1, 2, 3))
        return {"red": means.argmax(axis=1) == 0, "light": means.mean(axis=1) > 100}


def silent_judge(clips: np.ndarray, prompts: list[str]) -> None:
    """Say nothing."""


def save_base_and_erasers(
    folder: Path, pipeline: DiffusionPipeline | None = None, names: tuple[str, ...] = ("seven", "two")
) -> tuple[Path, list[Path]]:
    """Folders of a tiny pipeline and of erasers that show."""
    register_eraser()
    pipeline = pipeline or tiny_video_pipeline()
    pipeline.save_pretrained(folder / "base")
    torch.manual_seed(1)
    erasers = []
    for name in names:
        config = EraserConfig(r=4, init_weights=False)
        inject_adapter_in_model(config, pipeline.transformer, name)
        erasers.append(folder / name)
        save_eraser(pipeline, erasers[-1], adapter_name=name)
    return folder / "base", erasers
