"""What erasers add to the time of inference."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import CogVideoXPipeline, DiffusionPipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.eraser_steps import Subject
from benchmarks.timing import compare
from diffusers_ext.eraser.linear import merge_eraser
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.families import find_family
from diffusers_ext.families.family import Velocity
from diffusers_ext.training.eraser.run import add_eraser

SETTINGS = ((1, "gelu"), (1, "linear"), (1, "linear, merged"), (4, "gelu"))


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def erased_pipeline(subject: Subject, erasers: int = 1, kind: str = "gelu") -> DiffusionPipeline:
    """A copy of the pipeline with so many erasers, frozen as `load_eraser` leaves them."""
    pipeline = copy.copy(subject.pipeline)
    pipeline.transformer = copy.deepcopy(subject.pipeline.transformer)
    names = [f"eraser_{index}" for index in range(erasers)]
    kind, _, merged = kind.partition(", ")
    for name in names:
        add_eraser(pipeline.transformer, EraserTraining(rank=subject.rank, kind=kind), name)
    if names:
        pipeline.transformer.set_adapters(names)
    if merged:
        merge_eraser(pipeline, *names)
    pipeline.transformer.requires_grad_(False).eval()
    return pipeline


@torch.no_grad()
def counted(velocity: Velocity, inputs: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Operators and FLOPs of a call; the counter knows no attention of the CPU."""
    velocity(*inputs)  # fuses
    with OperatorCounter() as operators:
        velocity(*inputs)
    with FlopCounterMode(display=False) as flops:
        velocity(*inputs)
    return operators.count, flops.get_total_flops()


def inference_costs(
    subject: Subject, pairs: int, rows: tuple[int, ...], rows_a_timing: int = 64
) -> list[dict[str, Any]]:
    """Calls of the transformer with one eraser, of each kind and merged, and with four, in terms of calls without.

    On one thread it is the process that is timed: other programs may run.

    Args:
        subject: model and sizes.
        pairs: of timings.
        rows: of a call; guidance has two a clip.
        rows_a_timing: of so many calls that a timing is long enough to be told from noise.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    without = find_family(subject.pipeline).velocity(erased_pipeline(subject, 0), *subject.size)
    found = []
    for erasers, kind in SETTINGS:
        erased = find_family(subject.pipeline).velocity(erased_pipeline(subject, erasers, kind), *subject.size)
        for count in rows:
            text = (count, *subject.text.shape[1:])
            inputs = [torch.zeros(count, *subject.latents), torch.zeros(count, dtype=torch.long), torch.zeros(text)]

            def run(velocity: Velocity, inputs: list = inputs) -> None:
                with torch.no_grad():
                    for _ in range(max(1, rows_a_timing // len(inputs[0]))):
                        velocity(*inputs)

            time_ratio = compare(lambda model=erased: run(model), lambda: run(without), pairs, clock)
            named = "" if (erasers, kind) == (1, "gelu") else f", {erasers} {kind}"
            ratios = [a / b for a, b in zip(counted(erased, inputs), counted(without, inputs), strict=True)]
            counts = dict(zip(("operators", "flops"), ratios, strict=True))
            found.append({"what": f"{subject.name}, {count} rows{named}", **time_ratio._asdict(), **counts})
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
