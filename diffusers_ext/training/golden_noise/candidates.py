"""A prompt and a noise that are tried together, and the pair that is made of them by one of the targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.evaluation.rendering import image_seed
from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.diverse_targets import differentiable_prediction, spread_noise
from diffusers_ext.golden_noise.noise_statistics import noise_statistics
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from diffusers_ext.golden_noise.pairs.shards import PairRecord, Part
from diffusers_ext.golden_noise.redenoise import encode_prompts, redenoise_sequence
from diffusers_ext.golden_noise.reward_targets import ascend_reward, best_neighbour
from diffusers_ext.rewards.reward import Reward, checked_scores
from diffusers_ext.training.golden_noise.rendering import draw_with_gradient, render
from diffusers_ext.training.golden_noise.settings import PairSettings


class Candidate(NamedTuple):
    """A prompt and a noise that are tried together."""

    index: int
    prompt: str
    seed: int  # of the noise
    sampling_seed: int  # of what a sampler draws on its way


def list_candidates(prompts: Sequence[str], noises_per_prompt: int, seed: int) -> list[Candidate]:
    """All that is tried, prompt by prompt; a noise depends on the seed, its prompt and its number."""
    numbered = [(prompt, number) for prompt in prompts for number in range(noises_per_prompt)]
    return [
        Candidate(
            index, prompt, image_seed(seed, prompt, number, "pairs"), image_seed(seed, prompt, number, "pair sampling")
        )
        for index, (prompt, number) in enumerate(numbered)
    ]


class PairMaker:
    """Turns a batch of candidates into pairs; nothing but the batch decides the result."""

    def __init__(
        self, pipeline: DiffusionPipeline, shape: Sequence[int], settings: PairSettings, reward: Reward | None
    ) -> None:
        """`shape` is that of the latents, `(channels, height, width)`; without a reward all pairs stay undrawn."""
        self.pipeline, self.shape = pipeline, tuple(shape)
        self.settings, self.reward = settings, reward

    @torch.no_grad()
    def make(self, batch: Sequence[Candidate]) -> Part:
        """Two denoiser calls a step for the batch; one pipeline call for all of its pictures."""
        text = self._encode(batch)
        noise = torch.stack([source_noise(candidate.seed, self.shape) for candidate in batch])
        states = torch.stack(self._states(batch, text, noise), 1)
        deltas = (states.float().cpu() - noise[:, None]).half()
        golden = noise + deltas[:, -1].float()  # what will be read back is what is judged
        records = _records(batch, golden)
        if self.reward is None or self.settings.no_filter:
            return Part(deltas, records, [])
        before, after = self._score(batch, text, torch.cat([noise, golden])).view(2, -1).tolist()
        records = [
            record._replace(reward_source=a, reward_golden=b)
            for record, a, b in zip(records, before, after, strict=True)
        ]
        kept = [row for row, record in enumerate(records) if gain(record) > self.settings.margin]
        rejected = [record for row, record in enumerate(records) if row not in kept]
        return Part(deltas[kept], [records[row] for row in kept], rejected)

    def _encode(self, batch: Sequence[Candidate]) -> TextConditioning:
        prompts = list(dict.fromkeys(candidate.prompt for candidate in batch))
        # Not the empty string: SDXL reads zeros in place of a prompt that is not given.
        text = encode_prompts(self.pipeline, prompts, self.settings.negative_prompt or None)
        return text[[prompts.index(candidate.prompt) for candidate in batch]]

    def _states(
        self, batch: Sequence[Candidate], text: TextConditioning, noise: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        """Golden noise of every step, each made of the one before."""
        given, placed = self.settings, noise.to(self.pipeline._execution_device)
        if given.target == "guidance":
            return redenoise_sequence(
                self.pipeline, placed, text, repeats=given.num_steps, num_steps=given.redenoise_steps, w1=given.w1,
                w2=given.w2, legacy_inversion=given.legacy_inversion,
            ).unbind(1)  # fmt: skip
        states = [placed]
        for step in range(given.num_steps):
            if given.target == "reward":
                score = partial(self._differentiable_score, batch, text)
                golden = ascend_reward(states[-1], score, steps=given.ascent_steps, rate=given.ascent_rate)
            elif given.target == "diversity":
                predict = differentiable_prediction(
                    self.pipeline, text, num_steps=given.num_inference_steps, guidance_scale=given.guidance_scale
                )
                golden = spread_noise(
                    states[-1], predict, gain=given.diversity_gain, steps=given.ascent_steps, rate=given.ascent_rate
                )
            else:
                score = partial(self._score, batch, text)
                golden = best_neighbour(states[-1], self._others(batch, step), score, spread=given.spread)
            states.append(golden)
        return states[1:]

    def _others(self, batch: Sequence[Candidate], step: int) -> Iterator[torch.Tensor]:
        """Fresh noises beside that of each seed, `best_of` with it."""
        for number in range(1, self.settings.best_of):
            stream = f"best of n {step} {number}"
            seeds = [image_seed(one.seed, one.prompt, number, stream) for one in batch]
            yield torch.stack([source_noise(seed, self.shape) for seed in seeds]).to(self.pipeline._execution_device)

    def _differentiable_score(
        self, batch: Sequence[Candidate], text: TextConditioning, noise: torch.Tensor
    ) -> torch.Tensor:
        seeds = [candidate.sampling_seed for candidate in batch]
        pixels = draw_with_gradient(self.pipeline, noise, text, self.settings, seeds, self.settings.gradient_steps)
        return self.reward.score_pixels(pixels, [candidate.prompt for candidate in batch])

    def _score(self, batch: Sequence[Candidate], text: TextConditioning, noise: torch.Tensor) -> torch.Tensor:
        """Of one noise a candidate, or of several groups of such noises; on the CPU."""
        copies = len(noise) // len(batch)
        seeds = [candidate.sampling_seed for candidate in batch] * copies
        images = render(self.pipeline, noise, text[[*range(len(batch))] * copies], self.settings, seeds)
        return checked_scores(self.reward, images, [candidate.prompt for candidate in batch] * copies)


def _records(batch: Sequence[Candidate], golden: torch.Tensor) -> list[PairRecord]:
    columns = (column.tolist() for column in noise_statistics(golden))
    return [
        PairRecord(candidate.index, candidate.prompt, candidate.seed, None, None, *statistics)
        for candidate, *statistics in zip(batch, *columns, strict=True)
    ]


def gain(record: PairRecord) -> float:
    """By how much golden noise raised the reward."""
    return record.reward_golden - record.reward_source
