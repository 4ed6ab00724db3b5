"""Batches that depend on the step alone, so that a resumed run repeats them to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from diffusers_ext.core.seeds import epoch_generator


class StepBatchSampler:
    """Endless batches of dataset indices in which batch `i` is a function of `(seed, i)` alone.

    Each epoch is a fresh permutation; a batch may span two epochs, so no sample is dropped and a data set smaller
    than the batch is repeated. Processes take disjoint slices of one global batch.

    Args:
        length: number of samples in the data set, positive.
        batch_size: samples per process and micro-step, positive.
        seed: seed of the permutations.
        start: first micro-step to yield (a resumed run passes the number it has done).
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
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
