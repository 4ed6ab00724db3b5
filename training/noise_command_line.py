"""The command line of the scripts that train golden-noise networks: defaults by network, and rules."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from diffusers_ext.command_line.argument_parser import OneLineParser
from training.argument_rules import check_training_arguments, check_values
from training.arguments import add_sampling_arguments
from training.config_file import parse_arguments
from training.evaluation_names import add_golden_noise_names
from training.golden_noise_arguments import PAIR_GROUPS, SEQUENCE_GROUPS, read_aliases
from training.pair_arguments import add_filter_arguments, add_pair_arguments


# The published settings of each kind; of GoldenNoiseModel, those of the bundled example.
DEFAULTS: dict[str, dict[str, Any]] = {
    "npnet": {"train_batch_size": 16, "learning_rate": 1e-4, "num_epochs": 30},
    "golden_noise_model": {"train_batch_size": 32, "learning_rate": 5e-4, "num_epochs": 30},
    "transformer": {"train_batch_size": 8, "learning_rate": 5e-5, "num_epochs": 50},
    "rnn": {"train_batch_size": 16, "learning_rate": 1e-4, "num_epochs": 50},
}
_WEIGHT_DECAY = 1e-2
# Of all scripts that may share one YAML file with these.
_KNOWN_GROUPS = (
    *PAIR_GROUPS,
    *SEQUENCE_GROUPS,
    add_golden_noise_names,
    add_sampling_arguments,
    add_pair_arguments,
    add_filter_arguments,
)


def parse_noise_arguments(
    description: str | None,
    groups: Sequence[Callable[[argparse.ArgumentParser], None]],
    models: Sequence[str],
    input_args: Sequence[str] | None,
) -> argparse.Namespace:
    """Command line of a training script of golden-noise networks, over the YAML file of `--config`.

    Args:
        description: of the script.
        groups: of its arguments.
        models: choices of `--model`, the first is the default.
        input_args: command line; `None` takes the process's.
    """
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=models, default=models[0], help="kind of network")
    for add_arguments in groups:
        add_arguments(parser)
    # These depend on the kind of network.
    parser.set_defaults(train_batch_size=None, max_train_steps=None, adam_weight_decay=None)
    args = parse_arguments(
        parser,
        input_args,
        ("pretrained_model_name_or_path", "dataset_dir", "output_dir"),
        read_aliases,
        _KNOWN_GROUPS,
    )
    for name, value in {**DEFAULTS[args.model], "adam_weight_decay": _WEIGHT_DECAY}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check_noise_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` for a wrong argument of these scripts, before anything is loaded."""
    check_training_arguments(args)
    counts = ("num_epochs", "text_batch_size", "num_validation_pairs", "text_embed_dim")
    check_values(args, counts, "at least 1", lambda value: value >= 1)
    check_values(args, ["ema_decay", "validation_split"], "in [0, 1)", lambda v: 0 <= v < 1)
    if hasattr(args, "kl_weight"):
        check_values(args, ["kl_weight"], "at least 0", lambda value: 0 <= value < math.inf)
        check_values(args, ["dropout"], "in [0, 1)", lambda value: 0 <= value < 1)
