"""The text of a run's prompts: in memory, or in files that its processes, its resume and later runs share."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline

from diffusers_ext.golden_noise.text_cache import CACHE_DTYPES, TextCache
from diffusers_ext.training.golden_noise.guard_settings import GuardTrainingSettings
from diffusers_ext.training.golden_noise.settings import NoiseSettings


def keep_text(
    settings: NoiseSettings | GuardTrainingSettings,
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    accelerator: Accelerator,
) -> TextCache:
    """Encode each different prompt once: of several processes and in a run with checkpoints into files.

    They are in `--text_cache_dir`, or in the run's output folder until `drop_own_text`.
    """
    directory = settings.text_cache_dir
    shared: dict[str, Any] = {}
    if directory is None and (accelerator.num_processes > 1 or settings.checkpointing_steps):
        directory = _own_text(settings)
    if directory is not None:
        shared["process"] = (accelerator.process_index, accelerator.num_processes)
        shared["wait_for_everyone"] = accelerator.wait_for_everyone
    return TextCache.encode(
        pipeline,
        prompts,
        batch_size=settings.text_batch_size,
        dtype=CACHE_DTYPES[settings.text_cache_dtype],
        directory=directory,
        **shared,
    )


def drop_own_text(settings: NoiseSettings | GuardTrainingSettings) -> None:
    """Remove what a run kept for its processes and its resume; what is mapped can still be read."""
    shutil.rmtree(_own_text(settings), ignore_errors=True)


def _own_text(settings: NoiseSettings | GuardTrainingSettings) -> Path:
    return Path(settings.output_dir, ".text_cache")
