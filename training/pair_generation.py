"""Noise pairs made batch by batch: re-denoise, render both noises together, score, keep or refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.evaluation.rendering import image_seed
from diffusers_ext.golden_noise.conditioning import TextConditioning, encode_prompts
from diffusers_ext.golden_noise.noise_statistics import noise_statistics
from diffusers_ext.golden_noise.pair_shards import PairRecord
from diffusers_ext.golden_noise.pair_writer import PairWriter, Part
from diffusers_ext.golden_noise.pairs import source_noise
from diffusers_ext.golden_noise.redenoise import redenoise_sequence
from diffusers_ext.golden_noise.settings import PairSettings
from diffusers_ext.rewards.reward import Reward, checked_scores
from training.pair_rendering import render


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
            index,
            prompt,
            image_seed(seed, prompt, number, "pairs"),
            image_seed(seed, prompt, number, "pair sampling"),
        )
        for index, (prompt, number) in enumerate(numbered)
    ]


class PairMaker:
    """Turns a batch of candidates into pairs; nothing but the batch decides the result."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        shape: Sequence[int],
        settings: PairSettings,
        reward: Reward | None,
    ) -> None:
        """Keep what all batches share.

        Args:
            pipeline: Stable Diffusion, SDXL, Hunyuan-DiT, SD3 or Flux; left as it is.
            shape: `(channels, height, width)` of the latents.
            settings: of the run.
            reward: decides which pairs stay; `None` keeps all and renders none.
        """
        self.pipeline, self.shape = pipeline, tuple(shape)
        self.settings, self.reward = settings, reward

    @torch.no_grad()
    def make(self, batch: Sequence[Candidate]) -> Part:
        """Two denoiser calls a step for the batch; one pipeline call for all of its pictures.

        Raises:
            ValueError: noise or a picture is not finite, or a reward is not a number.
        """
        text = self._encode(batch)
        noise = torch.stack([source_noise(candidate.seed, self.shape) for candidate in batch])
        states = redenoise_sequence(
            self.pipeline,
            noise.to(self.pipeline._execution_device),
            text,
            repeats=self.settings.num_steps,
            num_steps=self.settings.redenoise_steps,
            w1=self.settings.w1,
            w2=self.settings.w2,
            legacy_inversion=self.settings.legacy_inversion,
        )
        deltas = (states.float().cpu() - noise[:, None]).half()
        golden = noise + deltas[:, -1].float()  # what will be read back is what is judged
        records = _records(batch, golden)
        if self.reward is None:
            return Part(deltas, records, [])
        before, after = self._score(batch, text, noise, golden)
        records = [
            record._replace(reward_source=a, reward_golden=b)
            for record, a, b in zip(records, before, after, strict=True)
        ]
        kept = [
            row
            for row, record in enumerate(records)
            if record.reward_golden - record.reward_source > self.settings.margin
        ]
        rejected = [record for row, record in enumerate(records) if row not in kept]
        return Part(deltas[kept], [records[row] for row in kept], rejected)

    def _encode(self, batch: Sequence[Candidate]) -> TextConditioning:
        prompts = list(dict.fromkeys(candidate.prompt for candidate in batch))
        # Not the empty string: SDXL reads zeros in place of a prompt that is not given.
        text = encode_prompts(self.pipeline, prompts, self.settings.negative_prompt or None)
        return text[[prompts.index(candidate.prompt) for candidate in batch]]

    def _score(
        self,
        batch: Sequence[Candidate],
        text: TextConditioning,
        noise: torch.Tensor,
        golden: torch.Tensor,
    ) -> tuple[list[float], list[float]]:
        images = render(
            self.pipeline,
            torch.cat([noise, golden]),
            text[[*range(len(batch))] * 2],
            self.settings,
            [candidate.sampling_seed for candidate in batch] * 2,
        )
        prompts = [candidate.prompt for candidate in batch] * 2
        scores = checked_scores(self.reward, images, prompts).tolist()
        return scores[: len(batch)], scores[len(batch) :]


def generate(
    writer: PairWriter,
    shards: Iterable[int],
    candidates: Sequence[Candidate],
    make: Callable[[Sequence[Candidate]], Part],
    *,
    shard_size: int,
    batch_size: int,
    show_progress: bool = True,
) -> int:
    """Make shards, each of `shard_size` candidates, batch by batch; what is there is not made again.

    Args:
        writer: of the set.
        shards: numbers of those to be made here.
        candidates: of all shards.
        make: gives the pairs of a batch.
        shard_size, batch_size: candidates in each.
        show_progress: show a progress bar.

    Returns:
        Number of candidates tried here.
    """
    shards, tried = list(shards), 0
    parts = [split(candidates, shard_size, batch_size, shard) for shard in shards]
    total = sum(len(batch) for batches in parts for batch in batches)
    with tqdm(total=total, desc="pairs", disable=not show_progress) as bar:
        for shard, batches in zip(shards, parts, strict=True):
            for number, batch in enumerate(batches):
                if writer.read_part(shard, number) is None:
                    writer.write_part(shard, number, *make(batch))
                    tried += len(batch)
                bar.update(len(batch))
            writer.finish_shard(shard, len(batches))
    return tried


def split(
    candidates: Sequence[Candidate], shard_size: int, batch_size: int, shard: int
) -> list[Sequence[Candidate]]:
    """The batches of one shard."""
    own = candidates[shard * shard_size : (shard + 1) * shard_size]
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def _records(batch: Sequence[Candidate], golden: torch.Tensor) -> list[PairRecord]:
    columns = (column.tolist() for column in noise_statistics(golden))
    return [
        PairRecord(candidate.index, candidate.prompt, candidate.seed, None, None, *statistics)
        for candidate, *statistics in zip(batch, *columns, strict=True)
    ]
