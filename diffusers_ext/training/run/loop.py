"""The one training loop: every script hands it a model, a loss and data, and gets steps, logs, checkpoints, resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import recursively_apply
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers_ext.core.seeds import epoch_generator, step_generator, stream_seed
from diffusers_ext.training.run.checkpoints import Checkpoints


class StepBatchSampler:
    """Endless batches of dataset indices in which batch `i` is a function of `(seed, i)` alone.

    Each epoch is a fresh permutation; a batch may span two epochs, so no sample is dropped and a data set smaller than
    the batch is repeated. Processes take disjoint slices of one global batch. `batch_size` is that of a process and a
    micro-step; `start` is the first micro-step to yield (a resumed run passes the number it has done).
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, start: int = 0, process_index: int = 0, num_processes: int = 1
    ) -> None:
        if length < 1:
            raise ValueError(f"`length` must be at least 1, got {length}. Is the data set empty?")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.process_index, self.num_processes = process_index, num_processes
        self._epoch: tuple[int, list[int]] = (-1, [])

    def _sample(self, position: int) -> int:
        epoch, offset = divmod(position, self.length)
        if self._epoch[0] != epoch:
            generator = epoch_generator(self.seed, epoch)
            self._epoch = (epoch, torch.randperm(self.length, generator=generator).tolist())
        return self._epoch[1][offset]

    def batch(self, micro_step: int) -> list[int]:
        """The indices of one micro-step for this process."""
        first = (micro_step * self.num_processes + self.process_index) * self.batch_size
        return [self._sample(first + offset) for offset in range(self.batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        micro_step = self.start
        while True:
            yield self.batch(micro_step)
            micro_step += 1


class BucketBatchSampler(StepBatchSampler):
    """Such batches of which each holds samples of one bucket, in which alone these can be stacked.

    An epoch is as many batches as there are samples, and so many of a bucket as it has: over an epoch every sample is
    drawn equally often. In a bucket samples take turns as if it were the whole data set. The batches of all
    processes in a micro-step are of one bucket.
    """

    def __init__(
        self,
        buckets: Sequence[int],
        batch_size: int,
        seed: int,
        start: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        super().__init__(len(buckets), batch_size, seed, start, process_index, num_processes)
        self.buckets, self.members = list(buckets), {bucket: [] for bucket in sorted(set(buckets))}
        for index, bucket in enumerate(buckets):
            self.members[bucket].append(index)
        self._inside = {
            bucket: StepBatchSampler(
                len(members), batch_size, stream_seed(seed, "bucket", bucket), 0, process_index, num_processes
            )
            for bucket, members in self.members.items()
        }

    def batch(self, micro_step: int) -> list[int]:
        """The indices of one micro-step for this process: its share of one batch of one bucket."""
        bucket = self.buckets[self._sample(micro_step)]
        epoch, offset = divmod(micro_step, self.length)
        earlier = sum(self.buckets[index] == bucket for index in self._epoch[1][:offset])
        members = self.members[bucket]
        return [members[index] for index in self._inside[bucket].batch(epoch * len(members) + earlier)]


logger = get_logger(__name__)

_REMEDY = "Lower `--learning_rate`, or use bf16 in place of fp16; the last checkpoint is intact."
# Numbers of rows stay where the tables are that they look things up in.
_is_floating = torch.is_floating_point
Losses = dict[str, torch.Tensor]
LossFunction = Callable[[torch.nn.Module, Any, torch.Generator], Losses]


@dataclass(frozen=True)
class LoopSettings:
    """What steers the loop; the names are the command line's."""

    max_train_steps: int
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    seed: int = 0
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = False
    channels_last: bool = False
    logging_steps: int = 10
    description: str = "train"

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.max_grad_norm > 0:
            raise ValueError(f"`max_grad_norm` must be positive, got {self.max_grad_norm}.")


def check_steps_left(step: int, max_train_steps: int) -> None:
    """Raise `ValueError` if a checkpoint is from beyond the end of the run."""
    if step > max_train_steps:
        raise ValueError(
            f"`max_train_steps` must be at least the {step} steps of the checkpoint, got "
            f"{max_train_steps}. Raise it, or resume from an earlier checkpoint."
        )


@dataclass
class TrainingLoop:
    """Runs `loss_function` for `settings.max_train_steps` optimizer steps.

    Args:
        model: the module that trains, not yet prepared; its frozen parts may be anywhere.
        dataset: map-style data set; samples are collated by `collate_fn` (torch's default when `None`).
        loss_function: `(model, batch, generator) -> {"loss": scalar, ...}`; other entries are logged. All its random
            numbers must come from `generator`, a CPU generator that depends on seed and step alone, and those of a
            batch's rows by `draw_rows`, so that several processes train as one does. (What modules draw themselves, as
            dropout does, comes from the global generators, whose states checkpoints hold.)
        lr_scheduler: stepped once per optimizer step on every process; `None` keeps the rate.
        checkpoints: where to save and resume; `None` does neither.
        ema: averaged copy of the model's parameters, stepped after each optimizer step and saved with checkpoints.
        callbacks: `(every, function)` pairs; `function(step)` runs after each `every`-th step and after the last.
        buckets: that of each sample where a batch must hold samples of one, as of `BucketBatchSampler`.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    loss_function: LossFunction
    settings: LoopSettings
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    collate_fn: Callable[[list], Any] | None = None
    checkpoints: Checkpoints | None = None
    resume_from_checkpoint: str | None = None
    ema: EMAModel | None = None
    callbacks: Sequence[tuple[int, Callable[[int], None]]] = ()
    buckets: Sequence[int] | None = None
    history: list[dict[str, float]] = field(default_factory=list, init=False)
    seconds: float = field(default=0.0, init=False)
    _began: float = field(default=0.0, init=False)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the loop itself: its log and the seconds it has run."""
        seconds = self.seconds + time.perf_counter() - self._began
        return {"history": self.history, "seconds": seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.history, self.seconds = state["history"], state["seconds"]

    def _prepare(self) -> int:
        """Hand model and optimizer to accelerate, then resume; returns the step to start from."""
        theirs = self.accelerator.gradient_accumulation_steps
        if theirs != self.settings.gradient_accumulation_steps:
            raise ValueError(
                "`gradient_accumulation_steps` must be the same for the accelerator and the loop, got "
                f"{theirs} and {self.settings.gradient_accumulation_steps}. Is it set in the "
                "configuration of accelerate, too?"
            )
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if self.checkpoints is None:
            return 0
        for stateful in (self.lr_scheduler, self.ema, self):
            if stateful is not None:
                self.checkpoints.register(stateful)
        step = self.checkpoints.resume(self.resume_from_checkpoint)
        check_steps_left(step, self.settings.max_train_steps)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # it was loaded on the CPU
        return step

    def _batches(self, start_step: int) -> DataLoader:
        bucketed = self.buckets is not None
        sampler = (BucketBatchSampler if bucketed else StepBatchSampler)(
            self.buckets if bucketed else len(self.dataset),
            self.settings.train_batch_size,
            self.settings.seed,
            start_step * self.settings.gradient_accumulation_steps,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return DataLoader(
            self.dataset,
            batch_sampler=sampler,
            collate_fn=self.collate_fn,
            num_workers=self.settings.dataloader_num_workers,
            pin_memory=self._pins,
            # Without its own it would draw from the global one, whose state has just been restored.
            generator=torch.Generator(),
        )

    def run(self) -> torch.nn.Module:
        """Train and return the unwrapped model. Raises `FloatingPointError` when the loss stops being finite."""
        start_step = self._prepare()
        batches = iter(self._batches(start_step))
        self.model.train()
        self._began, parts = time.perf_counter(), []
        if start_step:
            self._call_back(start_step)  # the checkpoint is older than these calls
        if start_step < self.settings.max_train_steps:
            self.optimizer.train()
        progress = tqdm(
            range(start_step, self.settings.max_train_steps),
            initial=start_step,
            total=self.settings.max_train_steps,
            desc=self.settings.description,
            disable=not self.accelerator.is_local_main_process,
        )
        for step in progress:
            for accumulated in range(self.settings.gradient_accumulation_steps):
                micro_step = step * self.settings.gradient_accumulation_steps + accumulated
                parts.append(self._micro_step(next(batches), micro_step))
            if self.ema is not None:
                self.ema.step(self._unwrapped().parameters())
            self._after_step(step + 1, parts, progress)
        self.seconds += time.perf_counter() - self._began
        self.accelerator.wait_for_everyone()
        trained = self._unwrapped()
        if self.settings.channels_last:
            trained.to(memory_format=torch.contiguous_format)  # as files have it
        return trained

    def _unwrapped(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _micro_step(self, batch: Any, micro_step: int) -> Losses:
        generator = step_generator(
            self.settings.seed, micro_step, (self.accelerator.process_index, self.accelerator.num_processes)
        )
        if self._pins:
            batch = recursively_apply(self._to_device, batch, test_type=_is_floating)
        with self.accelerator.accumulate(self.model):
            losses = self.loss_function(self.model, batch, generator)
            self.accelerator.backward(losses["loss"])
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self._trained(), self.settings.max_grad_norm)
            self.optimizer.step()
            if self.accelerator.sync_gradients and self.lr_scheduler is not None:
                self.lr_scheduler.step()
            self.optimizer.zero_grad()
        return {name: value.detach() for name, value in losses.items()}

    @property
    def _pins(self) -> bool:
        """Whether there is a device that copies from page-locked memory."""
        return self.settings.dataloader_pin_memory and self.accelerator.device.type == "cuda"

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.accelerator.device, non_blocking=True)

    def _after_step(self, step: int, parts: list[Losses], progress: tqdm) -> None:
        last = step == self.settings.max_train_steps
        saving = self.checkpoints is not None and self.checkpoints.every and step % self.checkpoints.every == 0
        if saving or last or step % self.settings.logging_steps == 0:
            self._log(step, parts, progress)
        shown = saving or last or any(step % every == 0 for every, _ in self.callbacks)
        if shown:  # of optimizers with two sets of weights, those that are the result
            self.optimizer.eval()
        if saving or last:
            self._check_weights(step)
        if saving:
            self.checkpoints.save(step)
        self._call_back(step)
        if shown and not last:
            self.optimizer.train()

    def _call_back(self, step: int) -> None:
        for every, function in self.callbacks:
            if step == self.settings.max_train_steps or step % every == 0:
                function(step)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _check_weights(self, step: int) -> None:
        """A finite loss can have a gradient that is not, which the weights then hold for good."""
        finite = [parameter.detach().isfinite().all() for parameter in self._trained()]
        if not torch.stack(finite).all():
            raise FloatingPointError(
                f"The weights must stay finite, got some that are not after step {step}. {_REMEDY}"
            )

    def _log(self, step: int, parts: list[Losses], progress: tqdm) -> None:
        """Gather the mean losses since the last call; the only place where the device is waited for."""
        means = {name: torch.stack([part[name].float() for part in parts]).mean() for name in parts[0]}
        parts.clear()
        logs = {name: self.accelerator.reduce(mean, reduction="mean").item() for name, mean in means.items()}
        if not torch.isfinite(torch.tensor(logs["loss"])):
            raise FloatingPointError(f"The loss must stay finite, got {logs['loss']} before step {step}. {_REMEDY}")
        if self.lr_scheduler is not None:
            logs["lr"] = self.lr_scheduler.get_last_lr()[0]
        self.history.append({"step": step, **logs})
        progress.set_postfix({name: f"{value:.4g}" for name, value in logs.items()})
        self.accelerator.log(logs, step=step)
