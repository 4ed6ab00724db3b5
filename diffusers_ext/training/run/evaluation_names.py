"""What a YAML file for several scripts may hold for the evaluations; the other scripts pass over it."""

from __future__ import annotations

import argparse


_ERASURE = (
    "eraser", "scale", "evaluation_prompts", "num_videos_per_prompt", "kept_clips", "clip_format",
    "fps", "judge", "concept_aspect", "judge_frames", "target_concept", "classes",
    "class_template", "judge_model", "nudenet_threshold", "nudenet_resolution", "nudenet_lenient",
    "negative_prompt", "num_inference_steps", "sampling_guidance_scale", "sampling_batch_size",
    "num_frames", "height", "width", "model_cpu_offload", "vae_tiling",
)  # fmt: skip
_GOLDEN_NOISE = (
    "noise_model", "golden_noise_scale", "prompt_file", "prompt_column", "max_prompts",
    "num_images_per_prompt", "best_of", "batch_size", "height", "width", "save_images",
    "sheet_prompts", "reward", "reward_model", "reward_version", "dino", "clip", "target_steps",
    "redenoise_steps", "w1", "w2", "legacy_inversion", "negative_prompt", "num_inference_steps",
    "guidance_scale",
)  # fmt: skip


def add_erasure_names(parser: argparse.ArgumentParser) -> None:
    """Names of the evaluation of erasers."""
    for name in _ERASURE:
        parser.add_argument(f"--{name}")


def add_golden_noise_names(parser: argparse.ArgumentParser) -> None:
    """Names of the evaluation of golden noise."""
    for name in _GOLDEN_NOISE:
        parser.add_argument(f"--{name}")
