"""What every run starts with: the accelerator, the optimizer, the schedule, the log."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler

from diffusers_ext.core.run_settings import PRECISIONS
from diffusers_ext.core.settings import named_values
from diffusers_ext.training.run.checkpoint_files import (
    check_no_checkpoints,
    check_same_facts,
    find_checkpoint,
    read_checkpoint,
)
from diffusers_ext.training.run.loop import LoopSettings, check_steps_left
from diffusers_ext.training.run.script import check_output_dir, clear_output_dir


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


logger = get_logger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The run's accelerator; also seeds and sets up logging. It writes nothing."""
    given = vars(args)  # scripts without a loop have no loop arguments
    logging_dir = Path(args.output_dir, given.get("logging_dir", "logs"))
    accelerator = Accelerator(
        gradient_accumulation_steps=given.get("gradient_accumulation_steps", 1),
        mixed_precision=args.mixed_precision,
        log_with=given.get("report_to"),
        project_config=ProjectConfiguration(args.output_dir, str(logging_dir)),
    )
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    compiler = accelerator.state.dynamo_plugin.backend
    if "max_train_steps" not in given and compiler != DynamoBackend.NO:
        logger.warning(
            f"This script trains nothing and compiles nothing: accelerate's {compiler.value} has no effect."
        )
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def make_output_dir(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Make the folder of a run, once nothing can be wrong with its arguments any more."""
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        clear_output_dir(args)
    accelerator.wait_for_everyone()


def start_trackers(accelerator: Accelerator, args: argparse.Namespace, name: str) -> None:
    """Start `--report_to` with the run's arguments, the token left out."""
    if args.report_to is not None and accelerator.is_main_process:
        config = {
            k: v for k, v in named_values(args).items() if isinstance(v, (int, float, str, bool))
        }
        config.pop("hub_token", None)
        accelerator.init_trackers(name, config=config)


def make_optimizer(
    args: argparse.Namespace, parameters: Iterable[torch.nn.Parameter], accelerator: Accelerator
) -> torch.optim.Optimizer:
    """AdamW over `parameters` with the command line's settings."""
    rate = args.learning_rate
    if not rate > 0:
        raise ValueError(f"`learning_rate` must be positive, got {rate}.")
    if args.scale_lr:
        rate *= args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    return torch.optim.AdamW(
        parameters,
        lr=rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def make_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """The `--lr_scheduler`, counted in optimizer steps whatever the number of processes."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )


def loop_settings(args: argparse.Namespace, description: str) -> LoopSettings:
    """The loop's settings from the command line."""
    return LoopSettings(
        max_train_steps=args.max_train_steps,
        train_batch_size=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        dataloader_num_workers=args.dataloader_num_workers,
        logging_steps=args.logging_steps,
        description=description,
    )


def run_facts(args: argparse.Namespace, **facts: Any) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued: settings of the mathematics, and `facts`."""
    names = (
        "seed", "train_batch_size", "gradient_accumulation_steps", "mixed_precision",
        "learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2",
        "adam_weight_decay", "adam_epsilon", "max_grad_norm", "scale_lr",
    )  # fmt: skip
    values = {name: getattr(args, name) for name in names}
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        values["max_train_steps"] = args.max_train_steps
    return {**values, **facts}


def check_resume(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Raise `ValueError` if a run cannot go on, or start, in its output folder.

    Args:
        args: of the run.
        facts: those of `run_facts` that are known so far; the others are not compared.
    """
    if args.resume_from_checkpoint is None:
        check_output_dir(args)
        if args.checkpointing_steps is not None and not args.overwrite_output_dir:
            check_no_checkpoints(args.output_dir)
        return
    folder = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    step, stored = read_checkpoint(folder)
    check_same_facts({name: stored.get(name) for name in facts}, facts, folder)
    check_steps_left(step, args.max_train_steps)
