"""`diffusers-ext plan`: memory, disk and time of a run, before anything is downloaded or run."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from diffusers_ext.command_line.options import DOES_NOT_FIT, DONE, Command, Outcome
from diffusers_ext.core.settings import Settings, declaration
from diffusers_ext.planning.settings import (
    EditPlanSettings,
    EraserPlanSettings,
    GoldenNoisePlanSettings,
    GuardPlanSettings,
    NullSpacePlanSettings,
)

_DESCRIPTION = (
    "Nothing is downloaded: the run is gone through over tensors that have shapes and no data. What is "
    "not given is as the training script has it, unless its help below says what is taken."
)


def add_setting(group: argparse._ActionsContainer, settings_class: type[Settings]) -> None:
    """Add the flags of all settings; what is not given is not in the parsed arguments."""
    hints = get_type_hints(settings_class)
    for one in fields(settings_class):
        declared, hint = declaration(one), hints[one.name]
        kind = next((kind for kind in get_args(hint) if kind is not type(None)), hint)
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": declared.help}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction if one.default else "store_true"
        else:
            options["type"] = _PARSERS.get(one.name, kind if kind in (int, float) else str)
        if declared.several or get_origin(hint) is list:
            options["nargs"] = "+"
        names = (f"--{name}" for name in (one.name, *declared.old_names))
        group.add_argument(*names, dest=one.name, **options)


def given_setting(args: argparse.Namespace, settings_class: type[Settings]) -> dict[str, Any]:
    """What was given."""
    found = {one.name: vars(args)[one.name] for one in fields(settings_class) if one.name in args}
    if "layers" in found:
        from diffusers_ext.nullspace.settings import read_layers

        found["layers"] = read_layers(found["layers"], "layers")
    return found


def _mapping(word: str) -> dict[str, Any]:
    try:
        value = json.loads(word)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {word!r}")
    return value


_PARSERS = {"reward": lambda word: None if word == "none" else word, "structure": _mapping}


def _command(tool: str, summary: str, setting: type[Settings], *examples: str) -> Command:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--pretrained_model_name_or_path", required=True, help="a published name or a folder")
        parser.add_argument("--gpu", help='e.g. "RTX 4090"; "here" times the steps on this machine, at random weights')
        parser.add_argument("--memory_gib", type=float, help="in place of the GPU's own")
        add_setting(parser.add_argument_group("setting"), setting)

    def run(args: argparse.Namespace) -> Outcome:
        from diffusers_ext.planning import plan_run

        model, given = args.pretrained_model_name_or_path, given_setting(args, setting)
        plan = plan_run(tool, model, gpu=args.gpu, memory_gib=args.memory_gib, **given)
        return Outcome(plan.to_dict(), plan.table(), DOES_NOT_FIT if plan.fits is False else DONE)

    description = f"{summary[0].upper()}{summary[1:]}. {_DESCRIPTION}"
    return Command(f"plan {tool}", summary, description, examples, add_arguments, run)


PLANS = (
    _command(
        "eraser",
        "memory, disk and time of training an eraser",
        EraserPlanSettings,
        "plan eraser --pretrained_model_name_or_path CogVideoX-5b --memory_gib 24",
        'plan eraser --pretrained_model_name_or_path CogVideoX-2b --gpu "RTX 4090" --json',
    ),
    _command(
        "nullspace",
        "memory, disk and time of null-space DreamBooth",
        NullSpacePlanSettings,
        'plan nullspace --pretrained_model_name_or_path SD1.5 --gpu "RTX 3060" --mixed_precision fp16',
    ),
    _command(
        "edit",
        "memory, disk and time of an edit of knowledge",
        EditPlanSettings,
        "plan edit --pretrained_model_name_or_path SDXL --gpu here --mixed_precision bf16",
    ),
    _command(
        "golden-noise",
        "memory, disk and time of training a golden-noise network",
        GoldenNoisePlanSettings,
        'plan golden-noise --pretrained_model_name_or_path SDXL --gpu "A100 80GB" --num_prompts 10000 '
        "--mixed_precision fp16",
    ),
    _command(
        "guard",
        "memory, disk and time of training a guard of a golden-noise network",
        GuardPlanSettings,
        "plan guard --pretrained_model_name_or_path SDXL --num_prompts 500 --mixed_precision fp16",
    ),
)
