"""Rules for values on the command line, checked before anything is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers
from diffusers.optimization import SchedulerType


def check_values(
    args: argparse.Namespace, names: Sequence[str], rule: str, holds: Callable[[Any], bool]
) -> None:
    """Raise `ValueError` where a given argument breaks a rule; `None` is not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise ValueError(f"`{name}` must be {rule}, got {value}.")


def check_training_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` for a wrong argument of the training and reporting groups."""
    counts = (
        "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "logging_steps",
        "checkpointing_steps", "checkpoints_total_limit", "num_validation_images",
        "validation_steps", "num_inference_steps",
    )  # fmt: skip
    # Scripts that draw no pictures have no arguments of pictures.
    counts = [name for name in counts if hasattr(args, name)]
    check_values(args, counts, "at least 1", lambda value: value >= 1)
    others = ("lr_warmup_steps", "dataloader_num_workers", "adam_weight_decay", "adam_epsilon")
    check_values(args, others, "at least 0", lambda value: 0 <= value < math.inf)
    check_values(args, ["learning_rate"], "positive", lambda value: 0 < value < math.inf)
    check_values(args, ["max_grad_norm"], "positive", lambda value: value > 0)
    check_values(args, ["adam_beta1", "adam_beta2"], "in [0, 1)", lambda value: 0 <= value < 1)
    check_values(args, ["seed"], "from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
    # A piecewise schedule needs rules that no argument gives.
    schedules = [kind.value for kind in SchedulerType if kind.value != "piecewise_constant"]
    check_values(args, ["lr_scheduler"], f"one of {schedules}", lambda value: value in schedules)
    # Accelerate passes over trackers that are not installed, without a word.
    trackers = [str(tracker) for tracker in get_available_trackers()]
    rule = f"an installed tracker, 'all' or one of {trackers}"
    check_values(args, ["report_to"], rule, lambda value: value in ("all", *trackers))
    check_values(args, ["output_dir"], "a folder", lambda value: not Path(value).is_file())
