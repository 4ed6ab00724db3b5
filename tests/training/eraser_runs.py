"""Short trainings of erasers for a tiny CogVideoX in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import CogVideoXPipeline, DiffusionPipeline

from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.training.eraser.data import ClipSize, EraserData
from diffusers_ext.training.eraser.prompts import EraserPrompts, make_eraser_prompts
from diffusers_ext.training.eraser.run import add_eraser, main, make_data, parse_args
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.training.script_runs import command_line

TARGETS = ("a red seven moving right", "the blue seven goes up")
PRESERVED = ("three", "two")


def tiny_prompts() -> EraserPrompts:
    return make_eraser_prompts(TARGETS, "seven", anchor_concept="digit", preserved_concepts=PRESERVED)


def write_eraser_files(folder: Path, pipeline: DiffusionPipeline | None = None) -> Path:
    """A tiny base model, a prompts file and a file of preserved concepts."""
    (pipeline or tiny_video_pipeline()).save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("\n".join(["# seven", "", *TARGETS, ""]))
    (folder / "preserved.txt").write_text("\n".join(PRESERVED))
    return folder


def eraser_line(files: Path, output_dir: Path, **arguments: Any) -> list[str]:
    """Command line of a short training; `None` takes an argument away."""
    usual = {
        "pretrained_model_name_or_path": files / "base",
        "target_concept": "seven",
        "anchor_concept": "digit",
        "prompts_file": files / "prompts.txt",
        "preserved_concepts_file": files / "preserved.txt",
        "output_dir": output_dir,
        "eraser_rank": 4,
        "learning_rate": 5e-3,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "num_target_trajectories": 2,
        "num_preserved_trajectories": 2,
        "num_inference_steps": 3,
        "points_per_trajectory": 0,
    }
    return command_line(**{**usual, **arguments})


def train(files: Path, output_dir: Path, **arguments: Any) -> Path:
    """Run the training script; returns the folder it wrote."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return main(parse_args(eraser_line(files, output_dir, **arguments)))


def fill_eraser(parameters: list[torch.nn.Parameter], seed: int = 1) -> None:
    """Give an eraser random weights, with which it has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def tiny_training(recipe: EraserTraining) -> tuple[CogVideoXPipeline, EraserData, list[torch.nn.Parameter]]:
    """A tiny pipeline with a random eraser, and the samples of the model before it."""
    pipeline = tiny_video_pipeline()
    data = make_data(pipeline, tiny_prompts(), recipe, ClipSize(9, 16, 16), concept="seven")
    parameters = add_eraser(pipeline.transformer, recipe)
    fill_eraser(parameters)
    return pipeline, data, parameters


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training_report.json").read_text())
