"""What the benchmark costs on a GPU, computed from shapes and published rates; nothing is measured.

    python benchmarks/peft_image_generation/cost.py

The transformer of FLUX.2-klein-base-4B runs over tensors without data; operations and bytes are counted, and take the
time that `planning.gpus` gives them. The text encoder, the autoencoder and DINOv2 are left out: they run for seconds.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

from benchmarks.machine import table
from diffusers_ext.planning.gpus import find_gpu, gpu_seconds
from diffusers_ext.planning.models import published_model
from diffusers_ext.planning.tracing import (
    Operation,
    OperationTrace,
    fake_tensors,
    fill_with_fake_tensors,
    tensor_bytes,
)

MODEL = "FLUX.2-klein-base-4B"
SIDE, TEXT_TOKENS, TRAINING_ROWS = 512 // 16, 512, 2
TRAINING_STEPS, PROMPTS, RUN_STEPS = 750, 60, 50
# Four test prompts three times, ten drift prompts with and without the LoRA; 20 steps of two calls, for the guidance.
EVALUATION_CALLS = (4 * 3 + 10 * 2) * 20 * 2
TARGETS = r"context_embedder|.*\.add_(k|v)_proj"
CARDS = ("L4", "RTX 4090", "L40S", "A100 80GB", "H100")
GIB = 2**30


class Traced(NamedTuple):
    """What one call or one step takes."""

    operations: Counter[Operation]
    peak: int  # bytes beside the weights
    weights: int


def _inputs(rows: int, config: Any) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(rows, SIDE * SIDE, config.in_channels, dtype=torch.bfloat16),
        "timestep": torch.rand(rows, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(rows, TEXT_TOKENS, config.joint_attention_dim, dtype=torch.bfloat16),
        "txt_ids": torch.zeros(rows, TEXT_TOKENS, 4),
        "img_ids": torch.zeros(rows, SIDE * SIDE, 4),
    }


def traced(rows: int, *, trains: bool, checkpointing: bool = False, **config: int) -> Traced:
    """A call without gradients, or a training step of a LoRA of rank 1, by shapes.

    Args:
        config: changes of the transformer's, to count a smaller one.
    """
    model = published_model(MODEL).component("transformer").build(torch.bfloat16, **config)
    if trains:
        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=1, target_modules=TARGETS), model)
    with fake_tensors(), torch.set_grad_enabled(trains):
        fill_with_fake_tensors(model)
        if checkpointing:
            model.train()
            model.enable_gradient_checkpointing()
        inputs = _inputs(rows, model.config)
        with OperationTrace([*model.parameters(), *model.buffers()]) as trace:
            prediction = model(**inputs, return_dict=False)[0]
            if trains:
                prediction.float().square().mean().backward()
        return Traced(trace.operations, trace.peak, tensor_bytes(model.parameters()))


def main() -> None:
    """Print the table."""
    step = traced(TRAINING_ROWS, trains=True)
    saving = traced(TRAINING_ROWS, trains=True, checkpointing=True)
    one, two = traced(1, trains=False), traced(2, trains=False)
    rows = []
    for name in CARDS:
        gpu = find_gpu(name)
        statistics = PROMPTS * RUN_STEPS * gpu_seconds(two.operations, gpu)
        training = TRAINING_STEPS * gpu_seconds(step.operations, gpu)
        slower = TRAINING_STEPS * gpu_seconds(saving.operations, gpu)
        scoring = EVALUATION_CALLS * gpu_seconds(one.operations, gpu)
        minutes = [f"{seconds / 60:.1f}" for seconds in (statistics, training, slower, scoring)]
        rows.append([f"{name}, {gpu.memory_gib:g} GiB", *minutes])
    head = ["GPU", "statistics, min", "750 steps, min", "with gradient checkpointing, min", "scoring, min"]
    print(table(head, rows))
    print(
        f"\nTransformer {step.weights / GIB:.1f} GiB in bfloat16; a step of {TRAINING_ROWS} pictures takes "
        f"{step.peak / GIB:.1f} GiB more, {saving.peak / GIB:.1f} with gradient checkpointing."
    )


if __name__ == "__main__":
    main()
