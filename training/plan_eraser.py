"""Say how much memory the training of an eraser takes: `diffusers-ext plan eraser` with the training script's flags.

    python training/plan_eraser.py --pretrained_model_name_or_path CogVideoX-5b --gradient_checkpointing
    python training/plan_eraser.py --pretrained_model_name_or_path CogVideoX-5b --memory_gib 24

With `--memory_gib`, checkpointing and rows are chosen, and shorter clips if needed.
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
from diffusers_ext.eraser.recipe import EraserTraining
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
    for name, default in (("train_batch_size", 1), ("preserved_share", 0.5), ("localization_weight", 0.0)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    add_setting(parser, EraserPlanSettings)
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> RunPlan:
    """Plan and print; returns the plan."""
    check_values(args, ["memory_gib"], "positive", lambda value: value > 0)
    names = ("train_batch_size", "preserved_share", "localization_weight")
    recipe = EraserTraining(**{name: getattr(args, name) for name in names})
    target, preserved = rows_of_each_kind(recipe.train_batch_size, recipe.preserved_share)
    setting = {"target_rows": target, "preserved_rows": preserved, "localization": recipe.localization_weight > 0}
    setting |= {"gradient_checkpointing": False, **given_setting(args, EraserPlanSettings)}
    if args.memory_gib is None:
        plan = plan_run("eraser", args.pretrained_model_name_or_path, exact=args.exact, **setting)
    else:
        plan = recommend_eraser_training(args.pretrained_model_name_or_path, args.memory_gib, **setting)
    print(json.dumps(plan.to_dict(), indent=1) if args.json else plan.table())
    return plan


if __name__ == "__main__":
    run_script(parse_args, main)
