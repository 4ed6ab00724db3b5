"""Targets that keep pictures of one prompt apart: without what golden noise changes alike in all of them."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from diffusers_ext.golden_noise.noise_statistics import match_energy


logger = logging.getLogger(__name__)


class WithoutPromptMeans(Dataset):
    """Pairs whose golden noise lacks a share of the mean change of their prompt.

    With `d` the change of one noise and `m` the mean change of the prompt's other noises, golden
    noise is `noise + d - share m`, brought back to its energy. The mean is the same picture for
    every seed; it is most of what five repeats of the step add, and what makes their pictures alike.

    Args:
        pairs: as of `open_pairs`, at least two noises of every prompt.
        share: of the mean that is taken out, in (0, 1].

    Raises:
        ValueError: a share out of range, or a prompt with a single noise.
    """

    def __init__(self, pairs: Dataset, share: float) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"`remove_prompt_mean` must be in (0, 1], got {share}.")
        self.counts = Counter(pairs.prompts)
        alone = [prompt for prompt, count in self.counts.items() if count < 2]
        if alone:
            raise ValueError(
                "`remove_prompt_mean` must have several noises of every prompt to average over, "
                f"got one of {alone[0]!r} and {len(alone) - 1} others. Make pairs with "
                "`generate_npd.py --noises_per_prompt`, unfiltered, or leave it out."
            )
        self.pairs, self.share = pairs, share
        self.prompts, self.num_steps = pairs.prompts, pairs.num_steps
        self.latent_shape = pairs.latent_shape
        self.facts = pairs.facts
        self.sums = self._sum_changes()

    def _sum_changes(self) -> dict[str, torch.Tensor]:
        shape = (self.num_steps, *self.latent_shape)
        sums = {prompt: torch.zeros(shape) for prompt in self.counts}
        size = len(sums) * torch.Size(shape).numel() * 4
        logger.info(f"Mean changes of {len(sums)} prompts take {size / 2**30:.2f} GiB.")
        for index in tqdm(range(len(self.pairs)), desc="prompt means"):
            item = self.pairs[index]
            sums[item["prompt"]] += item["golden"] - item["noise"]
        return sums

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.pairs[index]
        change = item["golden"] - item["noise"]
        others = (self.sums[item["prompt"]] - change) / (self.counts[item["prompt"]] - 1)
        noise = item["noise"].expand_as(change)
        golden = match_energy(noise + change - self.share * others, noise)
        return {**item, "golden": golden}
