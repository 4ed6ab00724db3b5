"""What every run starts with: the accelerator, the optimizer, the schedule, the log."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler

from diffusers_ext.core.settings import named_values
from training.checkpoint_folders import (
    check_no_checkpoints,
    check_same_facts,
    find_checkpoint,
    read_checkpoint,
)
from training.loop import LoopSettings, check_steps_left
from training.output_folder import check_output_dir, clear_output_dir


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
