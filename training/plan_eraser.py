"""Say how much memory the training of an eraser takes: `diffusers-ext plan eraser` with other flags.

    python training/plan_eraser.py --pretrained_model_name_or_path CogVideoX-5b --gradient_checkpointing
    python training/plan_eraser.py --pretrained_model_name_or_path CogVideoX-5b --memory_gib 24

The flags are those of `train_cogvideox_eraser.py`. With `--memory_gib`, checkpointing and rows are chosen, and shorter
clips if needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.command_line.options import check_values
from diffusers_ext.command_line.plan import add_setting, given_setting
from diffusers_ext.eraser.batch import rows_of_each_kind
from diffusers_ext.planning import RunPlan, plan_run, recommend_eraser_training
from diffusers_ext.planning.settings import EraserPlanSettings
from diffusers_ext.training.run.script import run_script
from diffusers_ext.training.run.settings import OneLineParser


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="a folder, or such as CogVideoX-5b")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--memory_gib", type=float, help="of a GPU: recommend settings for it")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--exact", action="store_true", help="trace all blocks, not a few")
    parser.add_argument("--eraser_rank", type=int, default=128)
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--preserved_share", type=float, default=0.5)
    parser.add_argument("--localization_weight", type=float, default=0.0)
    add_setting(parser, EraserPlanSettings)
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> RunPlan:
    """Plan and print; returns the plan."""
    check_values(args, ["train_batch_size"], "at least 1", lambda value: value >= 1)
    check_values(args, ["preserved_share"], "in [0, 1]", lambda value: 0 <= value <= 1)
    check_values(args, ["memory_gib"], "positive", lambda value: value > 0)
    target, preserved = rows_of_each_kind(args.train_batch_size, args.preserved_share)
    setting = {"rank": args.eraser_rank, "target_rows": target, "preserved_rows": preserved}
    setting |= {"localization": args.localization_weight > 0, "gradient_checkpointing": False}
    setting |= given_setting(args, EraserPlanSettings)
    model = args.pretrained_model_name_or_path
    if args.memory_gib is None:
        plan = plan_run("eraser", model, exact=args.exact, **setting)
    else:
        plan = recommend_eraser_training(model, args.memory_gib, **setting)
    print(json.dumps(plan.to_dict(), indent=1) if args.json else plan.table())
    return plan


if __name__ == "__main__":
    run_script(parse_args, main)
