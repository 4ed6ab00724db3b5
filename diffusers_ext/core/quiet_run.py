"""Run a pipeline in eval mode, without its progress bar and without wearing out its scheduler."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from diffusers import DiffusionPipeline


@contextmanager
def eval_mode(pipeline: DiffusionPipeline) -> Iterator[None]:
    """All of a pipeline's models in eval mode; every module's own mode comes back."""
    models = [c for c in pipeline.components.values() if isinstance(c, torch.nn.Module)]
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def quiet_run(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Run a pipeline in eval mode, without its bar and on a copy of its scheduler; all come back."""
    scheduler, had_bar = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", None)
    with ExitStack() as restore:
        restore.callback(setattr, pipeline, "scheduler", scheduler)
        if had_bar is None:
            restore.callback(lambda: pipeline.__dict__.pop("_progress_bar_config", None))
        else:
            restore.callback(setattr, pipeline, "_progress_bar_config", had_bar)
        pipeline.scheduler = copy.deepcopy(scheduler)
        pipeline.set_progress_bar_config(disable=True)
        restore.enter_context(eval_mode(pipeline))
        yield
