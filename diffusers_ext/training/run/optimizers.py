"""Optimizers by name: what each is made of, and what runs with it."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from diffusers_ext.core.settings import OPTIMIZERS, TrainingSettings

_WITH_WARMUP = "constant_with_warmup"


def make_optimizer(
    settings: TrainingSettings, parameters: Iterable[torch.nn.Parameter], num_processes: int = 1
) -> torch.optim.Optimizer:
    """The `--optimizer` of parameters with the rate, betas, decay and epsilon of the settings.

    Schedule-Free has two sets of weights: `train()` puts those into the model that gradients are taken at, `eval()`
    the averaged ones, which are the result. `TrainingLoop` switches.
    """
    rate = settings.learning_rate
    if settings.scale_lr:
        rate *= settings.train_batch_size * settings.gradient_accumulation_steps * num_processes
    package, name = OPTIMIZERS[settings.optimizer]
    options: dict[str, Any] = {
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
    }
    if settings.optimizer == "adamw_fused":
        options["fused"] = True
    if settings.optimizer == "schedule_free" and settings.lr_scheduler == _WITH_WARMUP:
        options["warmup_steps"] = settings.lr_warmup_steps
    return pkgutil.resolve_name(f"{package}:{name}")(parameters, lr=rate, **options)


def make_schedule(
    settings: TrainingSettings, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """The `--lr_scheduler`, counted in optimizer steps whatever the number of processes."""
    # Schedule-Free's average has to know of the warm-up, so that it is the optimizer's own.
    name = "constant" if settings.optimizer == "schedule_free" else settings.lr_scheduler
    return get_scheduler(
        name, optimizer, num_warmup_steps=settings.lr_warmup_steps, num_training_steps=settings.max_train_steps
    )


def set_memory_format(settings: TrainingSettings, model: torch.nn.Module) -> None:
    """Put the channels of a model's convolutions last, with `--channels_last`; `ValueError` where it has none."""
    if not settings.channels_last:
        return
    # The one that cuts a transformer's input into patches is no reason.
    convolutions = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size[0] > module.stride[0]
    ]
    if not convolutions:
        raise ValueError(
            f"`channels_last` must be left out for a {type(model).__name__}, which has no convolutions to gain by it: "
            "it is for UNets."
        )
    model.to(memory_format=torch.channels_last)
