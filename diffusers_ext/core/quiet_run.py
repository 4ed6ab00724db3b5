"""Run a pipeline in eval mode, without its progress bar and without wearing out its scheduler."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.held_attributes import held_attribute


@contextmanager
def module_eval_mode(*modules: torch.nn.Module) -> Iterator[None]:
    """Modules and all their parts in eval mode; each part's own mode comes back.

    With several threads it is back once the last of them is done.
    """
    parts = dict.fromkeys(part for module in modules for part in module.modules())
    with ExitStack() as restore:
        for part in parts:
            restore.enter_context(held_attribute(part, "training", False))
        yield


def eval_mode(pipeline: DiffusionPipeline) -> AbstractContextManager[None]:
    """`module_eval_mode` of all of a pipeline's models."""
    components = pipeline.components.values()
    return module_eval_mode(*(c for c in components if isinstance(c, torch.nn.Module)))


@contextmanager
def quiet_run(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Run a pipeline in eval mode, without its bar and on a copy of its scheduler; all come back.

    They are back once the last of several threads is done; but a pipeline has one scheduler, so that
    threads that draw at the same time need a pipeline each (`from_pipe` shares the models).
    """
    scheduler, no_bar = copy.deepcopy(pipeline.scheduler), {"disable": True}
    with (
        held_attribute(pipeline, "scheduler", scheduler),
        held_attribute(pipeline, "_progress_bar_config", no_bar),
        eval_mode(pipeline),
    ):
        yield
