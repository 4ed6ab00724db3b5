"""What an eraser costs: a training step against the design document's, inference, and 5b's memory by plan.

python benchmarks/cost_of_eraser.py
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # before the profiler is loaded
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.eraser_inference import inference_costs, sampling_cost
from benchmarks.eraser_steps import (
    Subject,
    digits_subject,
    document_step,
    medium_subject,
    training_step,
)
from benchmarks.machine import table, write_results
from benchmarks.measured_memory import peak_bytes
from benchmarks.timing import compare
from diffusers_ext.core.memory_trace import fake_tensors, fill_with_fake_tensors
from diffusers_ext.eraser.outputs import erasers_disabled
from diffusers_ext.eraser.shaped_step import (
    StepShape,
    empty_inputs,
    student_pass,
)
from diffusers_ext.eraser.training_memory import step_memory, transformer_with_eraser
from diffusers_ext.families.cogvideox import PUBLISHED_TRANSFORMERS, CogVideoX
from diffusers_ext.planning import EraserSetting, plan_eraser_training


MIB, GIB = 2**20, 2**30
STEPS = {
    "velocities from before": {},
    "with masks from before": {"localization": True},
    "teacher asked in the step": {"live_teacher": True},
}
LIMITS = {"step_time": 1 / 3, "step_peak": 0.55, "inference": 1.05, "flops": 1.03, "5b_gib": 20}
FIVE_B = "CogVideoX-5b"
FIVE_B_LATENTS = (13, 16, 60, 90)  # 49 frames of 480x720


def step_costs(subject: Subject, pairs: int) -> list[dict[str, Any]]:
    """Time and peak of this project's steps in terms of the document's; peaks include the models."""
    document = document_step(subject)
    document()
    theirs = 2 * subject.weights + peak_bytes(document)
    found = []
    for name, options in STEPS.items():
        step = training_step(subject, **options)
        time = compare(step, document, pairs)
        ours = subject.weights + peak_bytes(step)
        row = {"model": subject.name, "step": name, "time": time._asdict()}
        found.append(row | {"peak": ours, "document_peak": theirs, "peak_ratio": ours / theirs})
    return found


def traced_against_measured(subject: Subject) -> list[dict[str, Any]]:
    """The plan's peak of forward and backward beside that of the real step."""
    found = []
    for checkpointing in (False, True):
        subject.gradient_checkpointing = checkpointing
        step = training_step(subject)
        step()
        shape = StepShape(
            subject.latents,
            rank=subject.rank,
            target_rows=subject.rows,
            preserved_rows=subject.rows,
            dtype=torch.float32,
            gradient_checkpointing=checkpointing,
        )
        traced = step_memory(subject.pipeline.transformer.config, shape).student
        row = {"model": subject.name, "checkpointing": checkpointing, "traced": traced}
        found.append(row | {"measured": peak_bytes(step)})
    subject.gradient_checkpointing = False
    return found


def flop_ratio() -> float:
    """FLOPs of a block of 5b with an eraser over those without; nothing is computed.

    All but the two ends of the model are such blocks, so that the ratio of the whole is no larger.
    """
    shape = StepShape(FIVE_B_LATENTS)
    config = {**PUBLISHED_TRANSFORMERS[FIVE_B], "num_layers": 1}
    model = transformer_with_eraser(config, shape).eval()
    fake, counts = fake_tensors(), []
    with fake, torch.no_grad():
        fill_with_fake_tensors(model)
        velocity = CogVideoX().empty_velocity(model, shape.latent_shape, shape.dtype)
        inputs = empty_inputs(velocity, shape, 1)
        for disabled in (False, True):
            with FlopCounterMode(display=False) as counter:
                if disabled:
                    with erasers_disabled(model):
                        velocity(*inputs)
                else:
                    velocity(*inputs)
            counts.append(counter.get_total_flops())
    # The counter does not know the CPU's attention: 2 x 2 tokens^2 width.
    video = FIVE_B_LATENTS[0] * FIVE_B_LATENTS[2] * FIVE_B_LATENTS[3] // 4
    attention = 4 * (video + model.config.max_text_seq_length) ** 2 * 3072
    return (counts[0] + attention) / (counts[1] + attention)


def five_b_plans() -> list[dict[str, Any]]:
    """Peak of training 5b at 49x480x720, target and preserved rows in turn and in one pass."""
    found = []
    for in_turn in (True, False):
        plan = plan_eraser_training(FIVE_B, EraserSetting(rows_in_turn=in_turn), exact=True)
        rows = "2 rows in turn" if in_turn else "2 rows in one pass"
        found.append({"rows": rows, "phases": plan.phases, "peak": plan.peak})
    if torch.cuda.is_available():
        found[0]["measured_on_gpu"] = measured_five_b(StepShape(FIVE_B_LATENTS, rows_in_turn=True))
        found[1]["measured_on_gpu"] = measured_five_b(StepShape(FIVE_B_LATENTS))
    return found


def measured_five_b(shape: StepShape) -> int:
    """Peak of the second step of 5b with random weights on the GPU, all that is kept included."""
    torch.cuda.empty_cache()
    model = transformer_with_eraser(PUBLISHED_TRANSFORMERS[FIVE_B], shape).to_empty(device="cuda")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    velocity = CogVideoX().empty_velocity(model, shape.latent_shape, shape.dtype)

    def step() -> None:
        with torch.autocast("cuda", shape.dtype):
            student_pass(velocity, shape)
        optimizer.step()
        optimizer.zero_grad()

    step()
    kept = torch.cuda.memory_allocated()
    return kept + peak_bytes(step)


def tables(results: dict[str, Any]) -> str:
    """Everything as Markdown."""
    steps = [
        [r["model"], r["step"], f"{r['time']['median']:.3f}"]
        + [f"{r['time']['lowest']:.3f} to {r['time']['highest']:.3f}", f"{r['peak_ratio']:.3f}"]
        for r in results["steps"]
    ]
    agreement = [
        [r["model"], "on" if r["checkpointing"] else "off"]
        + [f"{r[name] / MIB:.1f}" for name in ("traced", "measured")]
        + [f"{r['traced'] / r['measured']:.3f}"]
        for r in results["agreement"]
    ]
    inference = [
        [r["what"], f"{r['median']:.3f}", f"{r['lowest']:.3f} to {r['highest']:.3f}"]
        for r in results["inference"]
    ]
    inference.append(["5b at 49x480x720, FLOPs", f"{results['flop_ratio']:.4f}", "counted"])
    five_b = [
        [r["rows"], f"{r['peak'] / GIB:.1f}"]
        + [f"{r['measured_on_gpu'] / GIB:.1f}" if "measured_on_gpu" in r else "-"]
        for r in results["five_b"]
    ]
    ratios = ["time / document's (limit 0.333)", "range", "peak / document's (limit 0.55)"]
    peaks = ["5b at 49x480x720, bf16, checkpointing", "plan, GiB (limit 20)", "GPU, GiB"]
    parts = (
        (["model", "step", *ratios], steps),
        (["model", "checkpointing", "traced, MiB", "measured, MiB", "ratio"], agreement),
        (["inference", "with eraser / without (limit 1.05)", "range"], inference),
        (peaks, five_b),
    )
    return "\n\n".join(table(header, rows) for header, rows in parts)


def main(input_args: list[str] | None = None) -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="of steps of the larger model")
    args = parser.parse_args(input_args)
    tiny, medium = digits_subject(), medium_subject()
    results: dict[str, Any] = {
        "limits": LIMITS,
        "steps": step_costs(tiny, 5 * args.pairs) + step_costs(medium, args.pairs),
        "agreement": traced_against_measured(tiny) + traced_against_measured(medium),
        "inference": [
            *inference_costs(tiny, 7 * args.pairs, (2, 64)),
            sampling_cost(tiny, 3 * args.pairs, 8),
            *inference_costs(medium, args.pairs, (2,), rows_a_timing=2),
        ],
        "flop_ratio": flop_ratio(),
        "five_b": five_b_plans(),
    }
    text = tables(results)
    write_results("cost_of_eraser", results, text)
    print(text)


if __name__ == "__main__":
    main()
