"""Run a pipeline in eval mode, without its progress bar and without wearing out its scheduler."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from diffusers import DiffusionPipeline


@contextmanager
def module_eval_mode(*modules: torch.nn.Module) -> Iterator[None]:
    """Modules and all their parts in eval mode; each part's own mode comes back."""
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def eval_mode(pipeline: DiffusionPipeline) -> AbstractContextManager[None]:
    """`module_eval_mode` of all of a pipeline's models."""
    components = pipeline.components.values()
    return module_eval_mode(*(c for c in components if isinstance(c, torch.nn.Module)))


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
