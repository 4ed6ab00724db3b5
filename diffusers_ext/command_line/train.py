"""`diffusers-ext train`: the mains of the training scripts, with the scripts' own flags."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any, get_type_hints

from diffusers_ext.command_line.options import DONE, FAILED, PROGRAM

# What each is, and the module whose `parse_args` and `main` the script has too.
TRAININGS = {
    "nullspace": ("teach a subject without forgetting what the model knows", "diffusers_ext.training.nullspace.run"),
    "pairs": ("make noise pairs or sequences for golden noise", "diffusers_ext.training.pairs"),
    "noise": ("train a golden-noise network on them", "diffusers_ext.training.noise"),
    "eraser": ("train an eraser of one concept", "diffusers_ext.training.eraser.train"),
}
_LAUNCH = """One process runs. For several, or for accelerate's settings:
  accelerate launch -m diffusers_ext.training.{name} ..."""


def add_trainings(commands: Any) -> None:
    """Show the trainings in the help; `train` takes their command lines before this parser does."""
    title = "train a subject, golden noise or an eraser, with the flags of the scripts"
    train = commands.add_parser("train", help=title, description=title, allow_abbrev=False)
    parsers = train.add_subparsers(metavar="WHAT", required=True)
    for name, (summary, _) in TRAININGS.items():
        parsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"{PROGRAM} train {name} --help shows the flags.\n{_LAUNCH.format(name=name)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
        )


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
