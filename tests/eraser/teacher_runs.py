"""A tiny frozen model with encoded prompts, and collections of its samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import CogVideoXPipeline

from diffusers_ext.eraser.teacher.collect import collect_teacher_samples
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
    """In the order of `collect_teacher_samples`."""

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


def collect(velocity: CogVideoXVelocity, pipeline: CogVideoXPipeline, texts: Texts, **changes: Any) -> TeacherSamples:
    """Three target and four preserved runs of four steps, two at once."""
    settings = {
        "latent_shape": SHAPE,
        "num_target": 3,
        "num_preserved": 4,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "batch_size": 2,
        "show_progress": False,
    }
    texts = {f"{name}_embeds": value for name, value in texts._asdict().items()}
    texts["empty_embed"] = texts.pop("empty_embeds")
    return collect_teacher_samples(velocity, pipeline.scheduler, **{**texts, **settings, **changes})


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
