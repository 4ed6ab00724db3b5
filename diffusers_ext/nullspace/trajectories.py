"""Second moments along real denoising runs: batch by batch, in constant memory, resumable."""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from tqdm.auto import tqdm

from diffusers_ext.core.capture import capture
from diffusers_ext.core.quiet_run import quiet_run
from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.nullspace.measured_models import denoiser_of
from diffusers_ext.nullspace.slots import split_linear_name
from diffusers_ext.nullspace.statistics import FeatureStatistics


logger = logging.getLogger(__name__)

_SAVE_EVERY = 8  # batches between two writes of the running totals
_PROGRESS_PREFIX = "batches-"


def sampled_timesteps(scheduler: SchedulerMixin, num_inference_steps: int) -> list[int]:
    """The timesteps of a run in their order, each once; the scheduler is left as it was."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    return list(dict.fromkeys(int(timestep) for timestep in scheduler.timesteps))


class TrajectoryRun:
    """Second moments along denoising runs, batch by batch, resumable.

    Args:
        facts: of the statistics to be; the progress folder is tied to them.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        linears: dict[str, torch.nn.Module],
        facts: dict[str, Any],
        shard: tuple[int, int],
        progress_dir: str | os.PathLike | None,
        show_progress: bool,
    ) -> None:
        self.pipeline, self.linears, self.facts, self.shard = pipeline, linears, facts, shard
        self.folder = (
            None if progress_dir is None else Path(progress_dir, f"part-{shard[0]}-of-{shard[1]}")
        )
        self.show_progress = show_progress
        self.sources = shared_inputs(list(linears))
        self.moments: dict[str, SecondMoment] = {}

    def collect(self, prompts: list[str]) -> tuple[dict[str, SecondMoment], dict[str, str]]:
        """Run all of this shard's batches; returns the moments and `{linear: key}`."""
        settings = self.facts["settings"]
        size = settings["batch_size"]
        batches = [
            list(range(i, min(i + size, len(prompts)))) for i in range(0, len(prompts), size)
        ]
        mine = batches[self.shard[0] :: self.shard[1]]
        done = self._load_progress()
        bar = tqdm(
            mine[done:],
            initial=done,
            total=len(mine),
            desc="statistics",
            disable=not self.show_progress,
        )
        # One reader per matrix; the other Linears with the same input need no hook.
        readers = {key: name for name, key in reversed(self.sources.items())}
        targets = {key: self.linears[name] for key, name in readers.items()}
        denoiser = denoiser_of(self.pipeline)
        with quiet_run(self.pipeline), capture(denoiser, targets, self._count):
            for index, batch in enumerate(bar, start=done + 1):
                self._denoise([prompts[i] for i in batch], batch, settings)
                if self.folder is not None and (index % _SAVE_EVERY == 0 or index == len(mine)):
                    self._save_progress(index)
        # A process without any batch still takes part in the all-reduce, with zeros.
        for key, module in targets.items():
            if key not in self.moments:
                self.moments[key] = SecondMoment(module.in_features, module.weight.device)
        return self.moments, self.sources

    def _count(self, key: str, features: torch.Tensor) -> None:
        if key not in self.moments:
            self.moments[key] = SecondMoment(features.shape[-1], features.device)
        self.moments[key].update(features)

    def _denoise(self, prompts: list[str], indices: list[int], settings: dict[str, Any]) -> None:
        run = dict(settings["run"])
        seed = run.pop("seed")
        generators = [torch.Generator().manual_seed(seed + index) for index in indices]
        if settings["negative_prompt"]:
            # Left to its default otherwise: SDXL reads zeros in place of an empty prompt.
            run["negative_prompt"] = [settings["negative_prompt"]] * len(prompts)
        self.pipeline(
            prompt=prompts,
            generator=generators,
            output_type="latent",
            **run,
        )
        for key, moment in self.moments.items():
            moment.check_finite(key)

    def _save_progress(self, done: int) -> None:
        """Write `batches-<done>`, whole or not at all, then drop the older one."""
        older = self._stored()
        partial = self.folder / f".partial-{done}"
        shutil.rmtree(partial, ignore_errors=True)
        FeatureStatistics(self.moments, self.sources, self.facts).save_pretrained(partial)
        partial.rename(self.folder / f"{_PROGRESS_PREFIX}{done}")
        for folder in older:
            shutil.rmtree(folder)

    def _stored(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_PROGRESS_PREFIX}*"), key=_batches_done)

    def _load_progress(self) -> int:
        if self.folder is None or not self._stored():
            return 0
        folder = self._stored()[-1]
        stored = FeatureStatistics.from_pretrained(folder)
        if stored.facts != self.facts:
            raise ValueError(
                f"{self.folder} must hold the progress of this collection, got one with other "
                "prompts, models or settings. Remove it, or restore the old settings."
            )
        device = denoiser_of(self.pipeline).device
        for key, moment in stored.moments.items():
            self.moments[key] = SecondMoment(moment.dim, device).merge(moment)
        logger.info("Continuing after %d batches", _batches_done(folder))
        return _batches_done(folder)


def _batches_done(folder: Path) -> int:
    return int(folder.name.removeprefix(_PROGRESS_PREFIX))


def shared_inputs(linears: Sequence[str]) -> dict[str, str]:
    """`{linear: key}` in which Linears that read the same tensor share a key.

    Q, K and V of self-attention read one input, as do K and V of cross-attention.
    """
    sources = {}
    for name in linears:
        layer, slot = split_linear_name(name)
        group = "qkv" if layer.endswith("attn1") else "kv"
        sources[name] = f"{layer}.{group}" if slot in group else name
    return sources
