"""`diffusers-ext plan`: memory, disk and time of a run, before anything is downloaded or run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from diffusers_ext.command_line.command import DOES_NOT_FIT, DONE, Command, Outcome


_Setting = Mapping[str, tuple[type, str]]
_SIZE = {"height": (int, "pixels"), "width": (int, "pixels")}
_ERASER: _Setting = {"eraser_rank": (int, "width of the bottleneck"), **_SIZE}
_NULLSPACE: _Setting = {"rank": (int, "of the LoRA"), **_SIZE}
_GOLDEN_NOISE: _Setting = {"num_pairs": (int, "to generate"), **_SIZE}
_DESCRIPTION = (
    "Nothing is downloaded and nothing is measured: the run is gone through over tensors that have "
    "shapes and no data. What is not given is as the training script has it."
)


def _adder(setting: _Setting) -> Callable[[argparse.ArgumentParser], None]:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--pretrained_model_name_or_path", required=True, help="a published name or a folder"
        )
        card = parser.add_mutually_exclusive_group()
        card.add_argument("--gpu", help='e.g. "RTX 4090", for memory and time')
        card.add_argument("--memory_gib", type=float, help="of a GPU that is not known by name")
        group = parser.add_argument_group("setting")
        for name, (kind, explanation) in setting.items():
            if kind is bool:
                group.add_argument(
                    f"--{name}", action=argparse.BooleanOptionalAction, help=explanation
                )
            else:
                group.add_argument(f"--{name}", type=kind, help=explanation)

    return add_arguments


def _runner(tool: str, setting: _Setting) -> Callable[[argparse.Namespace], Outcome]:
    def run(args: argparse.Namespace) -> Outcome:
        from diffusers_ext.planning import plan_run

        given: dict[str, Any] = {
            name: getattr(args, name) for name in setting if getattr(args, name) is not None
        }
        model = args.pretrained_model_name_or_path
        plan = plan_run(tool, model, gpu=args.gpu, memory_gib=args.memory_gib, **given)
        code = DOES_NOT_FIT if plan.fits is False else DONE
        return Outcome(plan.to_dict(), plan.table(), code)

    return run


def _command(tool: str, summary: str, setting: _Setting, *examples: str) -> Command:
    description = f"{summary[0].upper()}{summary[1:]}. {_DESCRIPTION}"
    add_arguments, run = _adder(setting), _runner(tool, setting)
    return Command(f"plan {tool}", summary, description, examples, add_arguments, run)


PLAN_ERASER = _command(
    "eraser",
    "memory, disk and time of training an eraser",
    _ERASER,
    "plan eraser --pretrained_model_name_or_path CogVideoX-5b --memory_gib 24",
    'plan eraser --pretrained_model_name_or_path CogVideoX-2b --gpu "RTX 4090" --json',
)
PLAN_NULLSPACE = _command(
    "nullspace",
    "memory, disk and time of null-space DreamBooth",
    _NULLSPACE,
    'plan nullspace --pretrained_model_name_or_path stable-diffusion-v1-5 --gpu "RTX 3060"',
)
PLAN_GOLDEN_NOISE = _command(
    "golden-noise",
    "memory, disk and time of training a golden-noise network",
    _GOLDEN_NOISE,
    'plan golden-noise --pretrained_model_name_or_path stable-diffusion-xl-base-1.0 --gpu "A100 80GB"',
)
