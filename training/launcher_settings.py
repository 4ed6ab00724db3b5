"""What `accelerate launch` or `accelerate config` has set and a script's flags leave open, or contradict."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from diffusers_ext.core.run_settings import PRECISIONS


_MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"
_GRADIENT_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
# They split or replace the weights that these scripts save, project and compare.
_SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sharded data parallelism",
}


def settle_launcher_settings(
    args: argparse.Namespace, variables: Mapping[str, str] = os.environ
) -> None:
    """Give the settings that flags leave open the values that accelerate was given.

    Args:
        args: of a script. `mixed_precision` and, where the script has a loop,
            `gradient_accumulation_steps` are `None` without a flag, and never afterwards.
        variables: the environment, where `accelerate launch` puts its flags and those of its config
            file. Its "no" is also what it says without being asked, so a flag may replace it.

    Raises:
        ValueError: a flag contradicts accelerate, or accelerate has what no script can do.
    """
    for variable, name in _SHARDING.items():
        if variables.get(variable, "false").lower() == "true":
            raise ValueError(
                f"`accelerate launch` must run these scripts on whole models, got {name}. Launch them "
                "with `--multi_gpu`, or on one process."
            )
    if hasattr(args, "mixed_precision"):
        _settle_precision(args, variables.get(_MIXED_PRECISION, "no").lower())
    if hasattr(args, "gradient_accumulation_steps"):
        _settle_accumulation(args, variables.get(_GRADIENT_ACCUMULATION))


def _settle_precision(args: argparse.Namespace, theirs: str) -> None:
    if theirs not in PRECISIONS:
        raise ValueError(
            f"`mixed_precision` must be one of {', '.join(PRECISIONS)}, got {theirs!r} from accelerate "
            f"({_MIXED_PRECISION}). Pass `--mixed_precision` to `accelerate launch`."
        )
    if args.mixed_precision is None:
        args.mixed_precision = theirs
    elif theirs not in ("no", args.mixed_precision):
        raise _contradiction("mixed_precision", args.mixed_precision, theirs, _MIXED_PRECISION)


def _settle_accumulation(args: argparse.Namespace, theirs: str | None) -> None:
    if theirs is not None and not (theirs.isdecimal() and int(theirs) >= 1):
        raise ValueError(
            f"`gradient_accumulation_steps` must be a number from 1, got {theirs!r} from accelerate "
            f"({_GRADIENT_ACCUMULATION})."
        )
    if args.gradient_accumulation_steps is None:
        args.gradient_accumulation_steps = int(theirs or 1)
    elif theirs is not None and int(theirs) != args.gradient_accumulation_steps:
        raise _contradiction(
            "gradient_accumulation_steps",
            args.gradient_accumulation_steps,
            theirs,
            _GRADIENT_ACCUMULATION,
        )


def _contradiction(name: str, ours: object, theirs: str, variable: str) -> ValueError:
    return ValueError(
        f"`{name}` must be the same for accelerate and the script, got {theirs} from accelerate "
        f"({variable}) and {ours} from the script's arguments. Give it to one of them."
    )
