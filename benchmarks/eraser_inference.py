"""What erasers add to the time of inference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import CogVideoXPipeline

from benchmarks.eraser_steps import Subject
from benchmarks.timing import compare
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.families.cogvideox import CogVideoXVelocity
from diffusers_ext.training.eraser.run import add_eraser


def erased_pipeline(subject: Subject, erasers: int = 1, kind: str = "gelu") -> CogVideoXPipeline:
    """A copy of the pipeline with so many erasers, frozen as `load_eraser` leaves them."""
    pipeline = copy.copy(subject.pipeline)
    pipeline.transformer = copy.deepcopy(subject.pipeline.transformer)
    names = [f"eraser_{index}" for index in range(erasers)]
    for name in names:
        add_eraser(pipeline.transformer, EraserTraining(rank=subject.rank, kind=kind), name)
    if names:
        pipeline.transformer.set_adapters(names)
    pipeline.transformer.requires_grad_(False).eval()
    return pipeline


def inference_costs(
    subject: Subject, pairs: int, rows: tuple[int, ...], rows_a_timing: int = 64
) -> list[dict[str, Any]]:
    """Calls of the transformer with one eraser, of each kind, and with four, in terms of calls without.

    Args:
        subject: model and sizes.
        pairs: of timings.
        rows: of a call; guidance has two a clip.
        rows_a_timing: of so many calls that a timing is long enough to be told from noise.
    """
    without = CogVideoXVelocity.from_pipeline(erased_pipeline(subject, 0), *subject.size)
    found = []
    for erasers, kind in ((1, "gelu"), (1, "linear"), (4, "gelu")):
        with_erasers = CogVideoXVelocity.from_pipeline(erased_pipeline(subject, erasers, kind), *subject.size)
        for count in rows:
            text = (count, *subject.text.shape[1:])
            inputs = [torch.zeros(count, *subject.latents), torch.zeros(count, dtype=torch.long)]
            inputs.append(torch.zeros(text))

            def run(velocity: CogVideoXVelocity, inputs: list = inputs) -> None:
                with torch.no_grad():
                    for _ in range(max(1, rows_a_timing // len(inputs[0]))):
                        velocity(*inputs)

            time = compare(lambda model=with_erasers: run(model), lambda: run(without), pairs)
            named = "" if (erasers, kind) == (1, "gelu") else f", {erasers} {kind}"
            found.append({"what": f"{subject.name}, {count} rows{named}", **time._asdict()})
    return found


def sampling_cost(subject: Subject, pairs: int, clips: int) -> dict[str, Any]:
    """Whole calls of the pipeline: text, 20 steps with guidance, and the VAE."""
    erased, without = erased_pipeline(subject), erased_pipeline(subject, 0)
    prompts = ["a red seven moving right"] * clips
    num_frames, height, width = subject.size

    def run(pipeline: CogVideoXPipeline) -> None:
        pipeline(
            prompts,
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=20,
            guidance_scale=3.0,
            max_sequence_length=pipeline.transformer.config.max_text_seq_length,
            output_type="np",
        )

    time = compare(lambda: run(erased), lambda: run(without), pairs)
    return {"what": f"{subject.name}, {clips} whole clips", **time._asdict()}
