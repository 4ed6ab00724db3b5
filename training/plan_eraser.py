"""Say how much memory the training of an eraser takes, before anything is downloaded or run.

    python training/plan_eraser.py --pretrained_model_name_or_path CogVideoX-5b --gradient_checkpointing
    python training/plan_eraser.py --pretrained_model_name_or_path CogVideoX-5b --memory_gib 24

The flags are those of `train_cogvideox_eraser.py`. With `--memory_gib`, checkpointing and rows are
chosen, and shorter clips if needed. Nothing is measured: the training step is run over tensors that
have shapes and no data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.command_line.argument_parser import OneLineParser
from diffusers_ext.eraser.batch import rows_of_each_kind
from diffusers_ext.eraser.recipe import LATENTS_SOURCES, REAL_MODEL_DEFAULTS
from diffusers_ext.planning import (
    CardFit,
    EraserPlan,
    EraserSetting,
    plan_eraser_training,
    recommend_eraser_training,
)
from training.argument_rules import check_values
from training.arguments import add_traceback_argument
from training.run_setup import WEIGHT_DTYPES
from training.script_entry import run_script


_GIB = 2**30


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this script; defaults are those of the training script for real models."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="a folder, or such as CogVideoX-5b"
    )
    add_traceback_argument(parser)
    parser.add_argument("--memory_gib", type=float, help="of a card: recommend settings for it")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--exact", action="store_true", help="trace all blocks, not a few")
    parser.add_argument("--mixed_precision", choices=WEIGHT_DTYPES, default="bf16")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument(
        "--rows_in_turn",
        action="store_true",
        help="target rows, then preserved rows: less memory, one more forward of the first",
    )
    parser.add_argument("--latents_source", choices=LATENTS_SOURCES, default="trajectory")
    parser.add_argument("--trajectories_dtype", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--validation", action="store_true", help="with --validation_prompt")
    for name in ("num_frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int, help="the model's own without it")
    parser.add_argument("--eraser_rank", type=int, default=REAL_MODEL_DEFAULTS["rank"])
    parser.add_argument("--text_batch_size", type=int, default=8)
    for name in (
        "train_batch_size", "preserved_share", "localization_weight", "sampling_batch_size",
        "num_target_trajectories", "num_preserved_trajectories", "points_per_trajectory",
        "num_inference_steps",
    ):  # fmt: skip
        default = REAL_MODEL_DEFAULTS[name]
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args(input_args)


def setting_of(args: argparse.Namespace) -> EraserSetting:
    """What the command line asks for.

    Raises:
        ValueError: a number that the training script does not take either.
    """
    counts = ("train_batch_size", "num_target_trajectories", "num_preserved_trajectories")
    check_values(args, counts, "at least 1", lambda value: value >= 1)
    check_values(args, ["preserved_share"], "in [0, 1]", lambda value: 0 <= value <= 1)
    check_values(args, ["memory_gib"], "positive", lambda value: value > 0)
    target, preserved = rows_of_each_kind(args.train_batch_size, args.preserved_share)
    points = args.points_per_trajectory or args.num_inference_steps
    dtypes = {"fp32": WEIGHT_DTYPES["no"], "fp16": WEIGHT_DTYPES["fp16"]}
    names = (
        "num_frames", "height", "width", "rows_in_turn", "gradient_checkpointing",
        "latents_source", "sampling_batch_size", "text_batch_size", "validation",
    )  # fmt: skip
    return EraserSetting(
        rank=args.eraser_rank,
        target_rows=target,
        preserved_rows=preserved,
        dtype=WEIGHT_DTYPES[args.mixed_precision],
        localization=args.localization_weight > 0,
        target_points=args.num_target_trajectories * points,
        preserved_points=args.num_preserved_trajectories * points,
        storage_dtype=dtypes[args.trajectories_dtype],
        **{name: getattr(args, name) for name in names},
    )


def plan_facts(plan: EraserPlan) -> dict[str, Any]:
    """A plan as JSON; sizes are bytes."""
    setting = asdict(plan.setting)
    for name in ("dtype", "storage_dtype"):
        setting[name] = str(setting[name]).removeprefix("torch.")
    return {
        "setting": setting,
        "parts": plan.parts,
        "phases": plan.phases,
        "peak": plan.peak,
        "samples": plan.samples,
    }


def plan_table(plan: EraserPlan) -> str:
    """A plan as text."""
    setting = plan.setting
    rows = f"{setting.target_rows} target and {setting.preserved_rows} preserved rows"
    lines = [
        f"{setting.num_frames} frames of {setting.height}x{setting.width}, rank {setting.rank}, {rows} "
        f"{'in turn' if setting.rows_in_turn else 'in one pass'}, gradient checkpointing "
        f"{'on' if setting.gradient_checkpointing else 'off'}",
        "",
    ]
    width = max(map(len, (*plan.parts, *plan.phases, "samples kept"))) + 2
    lines += [f"{name:<{width}}{size / _GIB:9.2f} GiB" for name, size in plan.parts.items()]
    lines += ["", "peak of each phase"]
    worst = max(plan.phases, key=plan.phases.get)
    for name, size in plan.phases.items():
        lines.append(f"{name:<{width}}{size / _GIB:9.2f} GiB{' *' if name == worst else ''}")
    if plan.samples:
        lines += [
            "",
            f"{'samples kept':<{width}}{plan.samples / _GIB:9.2f} GiB, disk or host memory",
        ]
    return "\n".join(lines)


def fit_line(fit: CardFit, memory_gib: float) -> str:
    """The verdict for a card."""
    if fit.fits:
        free = (fit.available - fit.plan.peak) / _GIB
        return f"Fits {memory_gib:g} GiB with {free:.1f} GiB to spare beyond the reserve:"
    return (
        f"Nothing fits {memory_gib:g} GiB. The smallest that was tried needs "
        f"{fit.missing / _GIB:.1f} GiB more:"
    )


def main(args: argparse.Namespace) -> EraserPlan:
    """Plan and print; returns the plan."""
    source, setting = args.pretrained_model_name_or_path, setting_of(args)
    fit = None
    if args.memory_gib is not None:
        fit = recommend_eraser_training(source, args.memory_gib, setting)
    plan = fit.plan if fit else plan_eraser_training(source, setting, exact=args.exact)
    if args.json:
        verdict = {"fits": fit.fits, "missing": fit.missing} if fit else {}
        print(json.dumps({**verdict, **plan_facts(plan)}, indent=1))
    else:
        print(*([fit_line(fit, args.memory_gib)] if fit else []), plan_table(plan), sep="\n")
    return plan


if __name__ == "__main__":
    run_script(parse_args, main)
