"""A tiny frozen model with encoded prompts, and collections of its samples."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch
from diffusers import CogVideoXPipeline

from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.teacher.collect import collect_teacher_samples
from diffusers_ext.eraser.teacher.runs import EraserText
from diffusers_ext.eraser.teacher.store import TeacherSamples
from diffusers_ext.families.cogvideox import CogVideoXVelocity
from examples.moving_digits.prompts import PROMPT_LENGTH
from tests.tiny_cogvideox import tiny_video_pipeline

SIZE = (9, 16, 16)
SHAPE = (3, 4, 4, 4)
STEPS, GUIDANCE = 4, 3.0
TARGET = ["a red seven moving right", "a blue seven moving left"]
ANCHOR = ["a red digit moving right", "a blue digit moving left"]
PRESERVED = ["a red two moving up", "a green three moving down", "a blue nine moving left"]


class Texts(NamedTuple):
    """As `EraserText`, but for the empty prompt, which is `(1, text, dim)`."""

    target: torch.Tensor
    anchor: torch.Tensor
    preserved: torch.Tensor
    empty: torch.Tensor


def tiny_teacher() -> tuple[CogVideoXPipeline, CogVideoXVelocity, Texts]:
    """A pipeline with random weights, its velocity for clips of `SIZE`, and its embeddings."""
    pipeline = tiny_video_pipeline()

    @torch.no_grad()
    def encode(prompts: list[str]) -> torch.Tensor:
        return pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=PROMPT_LENGTH)[0]

    texts = Texts(encode(TARGET), encode(ANCHOR), encode(PRESERVED), encode([""]))
    return pipeline, CogVideoXVelocity.from_pipeline(pipeline, *SIZE), texts


_SETTINGS = {
    "num_target": "num_target_trajectories",
    "num_preserved": "num_preserved_trajectories",
    "guidance_scale": "sampling_guidance_scale",
    "batch_size": "sampling_batch_size",
}


def make_recipe(**changes: Any) -> EraserTraining:
    """Three target and four preserved runs of four steps, two at once; a count of 0 leaves a part out."""
    recipe = EraserTraining(
        num_target_trajectories=3,
        num_preserved_trajectories=4,
        num_inference_steps=STEPS,
        sampling_guidance_scale=GUIDANCE,
        sampling_batch_size=2,
    )
    for name, value in changes.items():
        setattr(recipe, _SETTINGS.get(name, name), value)
    return recipe


def collect(velocity: CogVideoXVelocity, pipeline: CogVideoXPipeline, texts: Texts, **changes: Any) -> TeacherSamples:
    """Samples of `make_recipe`, whose settings may be among the changes."""
    known = {*_SETTINGS, *(one.name for one in fields(EraserTraining))}
    recipe = make_recipe(**{name: changes.pop(name) for name in known & set(changes)})
    text = EraserText(*texts[:3], texts.empty[0])
    return collect_teacher_samples(velocity, pipeline.scheduler, text, recipe, SHAPE, show_progress=False, **changes)


class CountedVelocity(CogVideoXVelocity):
    """Counts the rows it is asked for, and may stop like a killed process."""

    def __init__(self, velocity: CogVideoXVelocity, calls: int | None = None) -> None:
        super().__init__(velocity.transformer, image_rotary_emb=velocity.image_rotary_emb)
        self.rows: list[int] = []
        self.calls = calls

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        if len(self.rows) == self.calls:
            raise KeyboardInterrupt
        self.rows.append(len(x_t))
        return super().__call__(x_t, t, prompt_embeds)
