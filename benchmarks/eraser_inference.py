"""What an eraser adds to the time of inference."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXPipeline

from benchmarks.eraser_steps import Subject
from benchmarks.timing import compare
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.families.cogvideox import CogVideoXVelocity


def inference_costs(
    subject: Subject, pairs: int, rows: tuple[int, ...], rows_a_timing: int = 64
) -> list[dict[str, Any]]:
    """Calls of the transformer with an eraser in terms of calls without.

    Args:
        subject: model and sizes.
        pairs: of timings.
        rows: of a call; guidance has two a clip.
        rows_a_timing: of so many calls that a timing is long enough to be told from noise.
    """
    erased = subject.student(EraserTraining(rank=subject.rank))
    erased.transformer.eval()
    subject.pipeline.transformer.eval()
    with_eraser, without = (
        CogVideoXVelocity.from_pipeline(pipeline, *subject.size) for pipeline in (erased, subject.pipeline)
    )
    found = []
    for count in rows:
        text = (count, *subject.text.shape[1:])
        inputs = [torch.zeros(count, *subject.latents), torch.zeros(count, dtype=torch.long)]
        inputs.append(torch.zeros(text))

        def run(velocity: CogVideoXVelocity, inputs: list = inputs) -> None:
            with torch.no_grad():
                for _ in range(max(1, rows_a_timing // len(inputs[0]))):
                    velocity(*inputs)

        time = compare(lambda: run(with_eraser), lambda: run(without), pairs)
        found.append({"what": f"{subject.name}, {count} rows", **time._asdict()})
    return found


def sampling_cost(subject: Subject, pairs: int, clips: int) -> dict[str, Any]:
    """Whole calls of the pipeline: text, 20 steps with guidance, and the VAE."""
    erased = subject.student(EraserTraining(rank=subject.rank))
    erased.transformer.eval()
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

    time = compare(lambda: run(erased), lambda: run(subject.pipeline), pairs)
    return {"what": f"{subject.name}, {clips} whole clips", **time._asdict()}
