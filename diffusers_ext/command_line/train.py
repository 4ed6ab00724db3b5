"""`diffusers-ext train`: the mains of the training scripts, with the scripts' own flags."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, get_type_hints

from diffusers_ext.command_line.options import DONE, FAILED, PROGRAM
from diffusers_ext.core.settings import Settings
from diffusers_ext.training.run.settings import early_value, settings_parser

# What each is, and the module whose `parse_args` and `main` the script has too.
TRAININGS = {
    "nullspace": ("teach a subject without forgetting what the model knows", "diffusers_ext.training.nullspace.run"),
    "pairs": ("make noise pairs or sequences for golden noise", "diffusers_ext.training.pairs"),
    "noise": ("train a golden-noise network on noise pairs or sequences", "diffusers_ext.training.noise"),
    "guard": ("train the guard of a golden-noise network on judged noise pairs", "diffusers_ext.training.guard"),
    "eraser": ("train an eraser of one concept", "diffusers_ext.training.eraser.run"),
}
_LAUNCH = """One process runs. For several, or for accelerate's settings:
  accelerate launch -m diffusers_ext.training.{name} ..."""


def add_trainings(commands: Any) -> None:
    """Show the trainings in the help; `train` takes their command lines before this parser does."""
    title = "train a subject, golden noise or an eraser, with the flags of the scripts"
    parsers = commands.add_parser("train", help=title, description=title, allow_abbrev=False)
    names = parsers.add_subparsers(metavar="WHAT", required=True)
    for name, (summary, _) in TRAININGS.items():
        names.add_parser(name, help=summary, add_help=False)


def train(name: str, arguments: Sequence[str]) -> int:
    """Run a training of `TRAININGS` in this process; returns the exit code. Errors not of the user's are raised."""
    from diffusers_ext.training.run.script import run_script

    module = importlib.import_module(TRAININGS[name][1])
    try:
        settings_class = get_type_hints(module.parse_args)["return"]
        run_script(partial(module.parse_args, arguments), module.main, settings_class, FAILED)
    except SystemExit as stop:
        return int(stop.code or DONE)
    return DONE


def show_flags(name: str, arguments: Sequence[str]) -> int:
    """What `--help` among the arguments of a training asks for, from its settings alone: no torch, no models."""
    try:
        parser = settings_parser(_settings_class(name, arguments))
        parser.prog = f"{PROGRAM} train {name}"
        summary = TRAININGS[name][0]
        parser.description = f"{summary[0].upper()}{summary[1:]}."
        parser.epilog = _LAUNCH.format(name=name)
        parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or DONE)
    except ValueError as error:  # of the file of `--config`
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return DONE


def _settings_class(name: str, arguments: Sequence[str]) -> type[Settings]:
    if name == "nullspace":
        from diffusers_ext.nullspace.settings import NullSpaceSettings

        return NullSpaceSettings
    if name == "eraser":
        from diffusers_ext.eraser.recipe import EraserSettings

        return EraserSettings
    if name == "guard":
        from diffusers_ext.training.golden_noise.guard_settings import GuardTrainingSettings

        return GuardTrainingSettings
    from diffusers_ext.training.golden_noise.settings import PairSettings, noise_settings_class

    return PairSettings if name == "pairs" else noise_settings_class(early_value(arguments, "model"))
