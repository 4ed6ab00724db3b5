"""Noise pairs from prompts, batch by batch; then a report of what came of it, and the upload."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.text_files import read_json
from diffusers_ext.evaluation.rendering import image_seed
from diffusers_ext.families.text_conditioning import TextConditioning
from diffusers_ext.golden_noise.noise_statistics import noise_statistics
from diffusers_ext.golden_noise.pairs.dataset import PairDataset, source_noise
from diffusers_ext.golden_noise.pairs.hub import pair_set_card
from diffusers_ext.golden_noise.pairs.shards import PairRecord, list_shards, read_table, shard_files
from diffusers_ext.golden_noise.pairs.writer import PairWriter, Part
from diffusers_ext.golden_noise.redenoise import encode_prompts, redenoise_sequence
from diffusers_ext.golden_noise.settings import PairSettings
from diffusers_ext.hub.push import check_card, make_repository
from diffusers_ext.rewards.reward import Reward, checked_scores
from diffusers_ext.training.golden_noise.rendering import render
from diffusers_ext.training.run.upload import card_arguments, repository_name, upload_arguments


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
        self, batch: Sequence[Candidate], text: TextConditioning, noise: torch.Tensor, golden: torch.Tensor
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


def split(candidates: Sequence[Candidate], shard_size: int, batch_size: int, shard: int) -> list[Sequence[Candidate]]:
    """The batches of one shard."""
    own = candidates[shard * shard_size : (shard + 1) * shard_size]
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def _records(batch: Sequence[Candidate], golden: torch.Tensor) -> list[PairRecord]:
    columns = (column.tolist() for column in noise_statistics(golden))
    return [
        PairRecord(candidate.index, candidate.prompt, candidate.seed, None, None, *statistics)
        for candidate, *statistics in zip(batch, *columns, strict=True)
    ]


logger = get_logger(__name__)


def prepare_pair_upload(settings: PairSettings, facts: Mapping[str, Any], latent_shape: Sequence[int]) -> None:
    """Make the repository and let the Hub read a card before the set is made, not after it.

    Args:
        settings: of the script.
        facts: how the set is going to be made.
        latent_shape: `(channels, height, width)`.

    Raises:
        ValueError: a fact is not known, such as the licence, or the Hub refuses the card.
    """
    counts = {"num_pairs": 0, "num_rejected": 0, "num_steps": settings.num_steps}
    card = pair_set_card(facts, latent_shape=latent_shape, **counts, **card_arguments(settings))
    check_card(card("user/name"))
    make_repository(repository_name(settings), repo_type="dataset", **upload_arguments(settings))


def publish_pairs(settings: PairSettings) -> str:
    """Upload the finished set of the output folder; returns the address of the commit."""
    pairs = PairDataset(settings.output_dir, verify=False)  # written by this run
    facts = {**card_arguments(settings), **upload_arguments(settings)}
    commit = pairs.push_to_hub(repository_name(settings), **facts)
    logger.info(f"Uploaded to {commit}")
    return commit


REPORT_NAME = "report.json"


def summarize(folder: str | os.PathLike, this_run: dict[str, Any]) -> dict[str, Any]:
    """Counts, rewards and noise of a set, of kept and of rejected pairs together and apart.

    Args:
        folder: of the set.
        this_run: what else the report says.
    """
    shards = [shard_files(folder, shard) for shard in list_shards(folder)]
    kept = [record for files in shards for record in read_table(files.pairs)]
    rejected = [record for files in shards for record in read_table(files.rejected)]
    judged = [record for record in (*kept, *rejected) if record.reward_golden is not None]
    report: dict[str, Any] = {
        "tried": len(kept) + len(rejected),
        "kept": len(kept),
        "rejected": len(rejected),
        "noise_of_kept": _noise(kept),
        "noise_of_rejected": _noise(rejected),
        "this_run": this_run,
    }
    if judged:
        report["win_rate"] = fmean(gain(record) > 0 for record in judged)
        report["mean_reward_source"] = fmean(record.reward_source for record in judged)
        report["mean_reward_golden"] = fmean(record.reward_golden for record in judged)
        report["highest_gain"] = max(gain(record) for record in judged)
    return report


def write_report(folder: str | os.PathLike, report: dict[str, Any]) -> None:
    """Write `report.json`."""
    write_atomically(Path(folder, REPORT_NAME), json.dumps(report, indent=2) + "\n")


def check_report(folder: str | os.PathLike) -> None:
    """Raise `ValueError` where a generation has ended without a pair."""
    report = read_json(Path(folder, REPORT_NAME), allow_nan=True)
    if not report["kept"]:
        raise ValueError(
            f"`margin` must let at least one pair pass, got none of {report['tried']}: the highest "
            f"gain is {report['highest_gain']:.4g}. Lower `--margin`, or try more prompts or "
            f"`--noises_per_prompt`. All scores are in {Path(folder, 'rejected')}."
        )


def gain(record: PairRecord) -> float:
    """By how much golden noise raised the reward."""
    return record.reward_golden - record.reward_source


def _noise(records: list[PairRecord]) -> dict[str, float]:
    names = ("mean", "std", "kurtosis", "lag1_correlation")
    return {name: fmean(getattr(record, name) for record in records) for name in names if records}
