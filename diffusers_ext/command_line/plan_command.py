"""`diffusers-ext plan`: memory, disk and time of a run, before anything is downloaded or run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from diffusers_ext.command_line.command import DOES_NOT_FIT, DONE, Command, Outcome
from diffusers_ext.command_line.plan_settings import (
    ERASER,
    GOLDEN_NOISE,
    NULLSPACE,
    Flag,
    add_setting,
    given_setting,
)


_DESCRIPTION = (
    "Nothing is downloaded: the run is gone through over tensors that have shapes and no data. What is "
    "not given is as the training script has it, unless its help below says what is taken."
)


def _adder(setting: Mapping[str, Flag]) -> Callable[[argparse.ArgumentParser], None]:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--pretrained_model_name_or_path", required=True, help="a published name or a folder"
        )
        parser.add_argument(
            "--gpu",
            help='e.g. "RTX 4090"; "here" times the steps on this machine, at random weights',
        )
        parser.add_argument("--memory_gib", type=float, help="in place of the GPU's own")
        add_setting(parser.add_argument_group("setting"), setting)

    return add_arguments


def _runner(tool: str, setting: Mapping[str, Flag]) -> Callable[[argparse.Namespace], Outcome]:
    def run(args: argparse.Namespace) -> Outcome:
        from diffusers_ext.planning import plan_run

        model, given = args.pretrained_model_name_or_path, given_setting(args, setting)
        plan = plan_run(tool, model, gpu=args.gpu, memory_gib=args.memory_gib, **given)
        code = DOES_NOT_FIT if plan.fits is False else DONE
        return Outcome(plan.to_dict(), plan.table(), code)

    return run


def _command(tool: str, summary: str, setting: Mapping[str, Flag], *examples: str) -> Command:
    description = f"{summary[0].upper()}{summary[1:]}. {_DESCRIPTION}"
    add_arguments, run = _adder(setting), _runner(tool, setting)
    return Command(f"plan {tool}", summary, description, examples, add_arguments, run)


PLAN_ERASER = _command(
    "eraser",
    "memory, disk and time of training an eraser",
    ERASER,
    "plan eraser --pretrained_model_name_or_path CogVideoX-5b --memory_gib 24",
    'plan eraser --pretrained_model_name_or_path CogVideoX-2b --gpu "RTX 4090" --json',
)
PLAN_NULLSPACE = _command(
    "nullspace",
    "memory, disk and time of null-space DreamBooth",
    NULLSPACE,
    'plan nullspace --pretrained_model_name_or_path SD1.5 --gpu "RTX 3060" --mixed_precision fp16',
)
PLAN_GOLDEN_NOISE = _command(
    "golden-noise",
    "memory, disk and time of training a golden-noise network",
    GOLDEN_NOISE,
    'plan golden-noise --pretrained_model_name_or_path SDXL --gpu "A100 80GB" --num_prompts 10000 '
    "--mixed_precision fp16",
)
