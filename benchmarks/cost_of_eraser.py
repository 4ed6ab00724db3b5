"""What an eraser costs: a training step against the design document's, inference, and 5b's memory by plan.

python benchmarks/cost_of_eraser.py
python benchmarks/cost_of_eraser.py --wan  # training steps of Wan alone
python benchmarks/cost_of_eraser.py --inference  # calls of the models alone, on one thread
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
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
    medium_wan_subject,
    training_step,
    wan_subject,
)
from benchmarks.machine import table, write_results
from benchmarks.measured_memory import peak_bytes
from benchmarks.timing import compare
from diffusers_ext.eraser.adapter.outputs import erasers_disabled
from diffusers_ext.planning import plan_run
from diffusers_ext.planning.eraser import draft_eraser, eraser_run
from diffusers_ext.planning.models import BaseModel, Component, read_base_model
from diffusers_ext.planning.settings import EraserPlanSettings
from diffusers_ext.planning.tracing import fake_tensors, fill_with_fake_tensors
from diffusers_ext.planning.work import Work, trace_work

MIB, GIB = 2**20, 2**30
STEPS = {
    "velocities from before": {},
    "with masks from before": {"localization": True},
    "teacher asked in the step": {"live_teacher": True},
}
LIMITS = {"step_time": 1 / 3, "step_peak": 0.55, "inference": 1.05, "flops": 1.03, "5b_gib": 20}
FIVE_B = "CogVideoX-5b"


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


def training_work(base: BaseModel, **setting: Any) -> Work:
    """The optimizer's step of a training, as it is planned."""
    draft = draft_eraser(base, EraserPlanSettings(**setting))
    return next(phase for phase in draft.phases if phase.name == "training").works[0]


def traced_against_measured(subject: Subject) -> list[dict[str, Any]]:
    """The plan's peak of forward and backward beside that of the real step."""
    pipeline = subject.pipeline
    components = {
        "transformer": Component("CogVideoXTransformer3DModel", dict(pipeline.transformer.config)),
        "vae": Component("AutoencoderKLCogVideoX", dict(pipeline.vae.config)),
        "text_encoder": Component("T5EncoderModel", pipeline.text_encoder.config.to_dict()),
    }
    base, found = BaseModel(subject.name, "CogVideoXPipeline", components), []
    setting = {"rank": subject.rank, "target_rows": subject.rows, "preserved_rows": subject.rows}
    setting |= {"mixed_precision": "no", **subject.size._asdict()}
    for checkpointing in (False, True):
        subject.gradient_checkpointing = checkpointing
        step = training_step(subject)
        step()
        work = training_work(base, gradient_checkpointing=checkpointing, **setting)
        row = {"model": subject.name, "checkpointing": checkpointing}
        found.append(row | {"traced": trace_work(work).peak, "measured": peak_bytes(step)})
    subject.gradient_checkpointing = False
    return found


def flop_ratio() -> float:
    """FLOPs of a block of 5b with an eraser over those without; nothing is computed.

    All but the two ends of the model are such blocks, so that the ratio of the whole is no larger.
    """
    run = eraser_run(read_base_model(FIVE_B), EraserPlanSettings(gradient_checkpointing=False))
    model, counts = run.student(num_layers=1).eval(), []
    with fake_tensors(), torch.no_grad():
        fill_with_fake_tensors(model)
        velocity = run.velocity(model)
        x_t, t = torch.empty(1, *run.latents), torch.zeros(1, dtype=torch.long)
        prompts = run.text(1)
        for disabled in (False, True):
            with FlopCounterMode(display=False) as counter:
                with erasers_disabled(model) if disabled else nullcontext():
                    velocity(x_t, t, prompts)
            counts.append(counter.get_total_flops())
    # The counter does not know the CPU's attention: 2 x 2 tokens^2 width.
    frames, _, height, width = run.latents
    attention = 4 * (frames * height * width // 4 + prompts.shape[1]) ** 2 * 3072
    return (counts[0] + attention) / (counts[1] + attention)


def five_b_plans() -> list[dict[str, Any]]:
    """Peak of training 5b at 49x480x720, target and preserved rows in turn and in one pass."""
    found = []
    for in_turn in (True, False):
        plan = plan_run("eraser", FIVE_B, separate_passes=in_turn, exact=True)
        rows = "2 rows in turn" if in_turn else "2 rows in one pass"
        phases = {phase.name: phase.peak for phase in plan.phases}
        found.append({"rows": rows, "phases": phases, "peak": plan.peak})
        if torch.cuda.is_available():
            found[-1]["measured_on_gpu"] = measured_five_b(in_turn)
    return found


def measured_five_b(in_turn: bool) -> int:
    """Peak of the second step of 5b with random weights on the GPU, all that is kept included."""
    torch.cuda.empty_cache()
    (model,), begin = training_work(read_base_model(FIVE_B), separate_passes=in_turn).make()
    for parameter in model.to_empty(device="cuda").parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    step = begin(torch.device("cuda"))
    step()
    kept = torch.cuda.memory_allocated()
    return kept + peak_bytes(step)


def step_table(results: dict[str, Any]) -> str:
    """Training steps as Markdown."""
    steps = [
        [r["model"], r["step"], f"{r['time']['median']:.3f}"]
        + [f"{r['time']['lowest']:.3f} to {r['time']['highest']:.3f}", f"{r['peak_ratio']:.3f}"]
        for r in results["steps"]
    ]
    ratios = ["time / document's (limit 0.333)", "range", "peak / document's (limit 0.55)"]
    return table(["model", "step", *ratios], steps)


def tables(results: dict[str, Any]) -> str:
    """Everything as Markdown."""
    agreement = [
        [r["model"], "on" if r["checkpointing"] else "off"]
        + [f"{r[name] / MIB:.1f}" for name in ("traced", "measured")]
        + [f"{r['traced'] / r['measured']:.3f}"]
        for r in results["agreement"]
    ]
    five_b = [
        [r["rows"], f"{r['peak'] / GIB:.1f}"]
        + [f"{r['measured_on_gpu'] / GIB:.1f}" if "measured_on_gpu" in r else "-"]
        for r in results["five_b"]
    ]
    peaks = ["5b at 49x480x720, bf16, checkpointing", "plan, GiB (limit 20)", "GPU, GiB"]
    parts = (
        (["model", "checkpointing", "traced, MiB", "measured, MiB", "ratio"], agreement),
        (
            ["5b at 49x480x720", "FLOPs with eraser / without (limit 1.03)"],
            [["counted", f"{results['flop_ratio']:.4f}"]],
        ),
        (peaks, five_b),
    )
    shown = [table(header, rows) for header, rows in parts]
    return "\n\n".join([step_table(results), inference_table(results["inference"]), *shown])


def measure(pairs: int) -> dict[str, Any]:
    """All costs of CogVideoX."""
    tiny, medium = digits_subject(), medium_subject()
    return {
        "limits": LIMITS,
        "steps": step_costs(tiny, 5 * pairs) + step_costs(medium, pairs),
        "agreement": traced_against_measured(tiny) + traced_against_measured(medium),
        "inference": [sampling_cost(tiny, 3 * pairs, 8), *calls(pairs)],
        "flop_ratio": flop_ratio(),
        "five_b": five_b_plans(),
    }


def calls(pairs: int) -> list[dict[str, Any]]:
    """Of the models, with erasers and without."""
    return [
        *inference_costs(digits_subject(), 7 * pairs, (2, 64)),
        *inference_costs(wan_subject(), 7 * pairs, (2, 64)),
        *inference_costs(medium_subject(), pairs, (2,), rows_a_timing=2),
    ]


def inference_table(found: Sequence[dict[str, Any]]) -> str:
    """Calls of the models as Markdown."""
    rows = [
        [r["what"], f"{r['median']:.3f}", f"{r['lowest']:.3f} to {r['highest']:.3f}"]
        + [f"{r[name]:.3f}" if name in r else "-" for name in ("operators", "flops")]
        for r in found
    ]
    return table(["inference", "time with eraser / without (limit 1.05)", "range", "operators", "FLOPs"], rows)


def main(input_args: list[str] | None = None) -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="of steps of the larger model")
    parser.add_argument("--wan", action="store_true", help="measure training steps of Wan alone")
    parser.add_argument("--inference", action="store_true", help="measure calls of models alone")
    args = parser.parse_args(input_args)
    if args.inference:
        results: dict[str, Any] = {"limits": LIMITS, "inference": calls(args.pairs)}
        name, text = "cost_of_eraser_inference", inference_table(results["inference"])
    elif args.wan:
        steps = step_costs(wan_subject(), 5 * args.pairs) + step_costs(medium_wan_subject(), args.pairs)
        results = {"limits": LIMITS, "steps": steps}
        name, text = "cost_of_eraser_wan", step_table(results)
    else:
        results = measure(args.pairs)
        name, text = "cost_of_eraser", tables(results)
    write_results(name, results, text)
    print(text)


if __name__ == "__main__":
    main()
