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
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler

from training.loop import LoopSettings


logger = get_logger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The run's accelerator; also seeds, sets up logging and makes the output folder."""
    logging_dir = Path(args.output_dir, args.logging_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(args.output_dir, str(logging_dir)),
    )
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return accelerator


def start_trackers(accelerator: Accelerator, args: argparse.Namespace, name: str) -> None:
    """Start `--report_to` with the run's arguments, the token left out."""
    if args.report_to is not None and accelerator.is_main_process:
        config = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, bool))}
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
