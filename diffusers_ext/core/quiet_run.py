"""Run a pipeline without its progress bar and without wearing out its scheduler."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from diffusers import DiffusionPipeline


@contextmanager
def quiet_run(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Run a pipeline without its progress bar and on a copy of its scheduler; both come back."""
    scheduler, had_bar = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", None)
    with ExitStack() as restore:
        restore.callback(setattr, pipeline, "scheduler", scheduler)
        if had_bar is None:
            restore.callback(lambda: pipeline.__dict__.pop("_progress_bar_config", None))
        else:
            restore.callback(setattr, pipeline, "_progress_bar_config", had_bar)
        pipeline.scheduler = copy.deepcopy(scheduler)
        pipeline.set_progress_bar_config(disable=True)
        yield
