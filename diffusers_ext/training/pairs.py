"""Make noise pairs (`--num_steps 1`) or sequences (more) whose golden noise suits its prompt.

    accelerate launch training/generate_npd.py \\
        --pretrained_model_name_or_path examples/digits/model --prompt_file prompts.txt \\
        --reward examples.digits.rewards:DigitsReward --num_inference_steps 6 \\
        --guidance_scale 1.5 --output_dir outputs/pairs
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.core.artifacts import CONFIG_NAME, fingerprint, write_atomically
from diffusers_ext.core.text_files import read_json, read_prompt_texts
from diffusers_ext.evaluation.judges import load_reward
from diffusers_ext.golden_noise.card import pair_set_card
from diffusers_ext.golden_noise.pairs.dataset import PairDataset
from diffusers_ext.golden_noise.pairs.shards import (
    PairRecord,
    PairWriter,
    Part,
    list_shards,
    read_config,
    read_table,
    shard_files,
)
from diffusers_ext.hub.push import check_card, make_repository
from diffusers_ext.rewards.reward import Reward, check_differentiable
from diffusers_ext.training.golden_noise.candidates import Candidate, PairMaker, gain, list_candidates
from diffusers_ext.training.golden_noise.rendering import load_base_pipeline, square_latent_shape
from diffusers_ext.training.golden_noise.settings import PairSettings
from diffusers_ext.training.run.checkpoint_files import check_same_facts
from diffusers_ext.training.run.script import (
    card_arguments,
    check_login,
    one_run_a_folder,
    pairs_words,
    repository_name,
    run_script,
    upload_arguments,
)
from diffusers_ext.training.run.settings import parse_settings
from diffusers_ext.training.run.setup import GOLDEN_NOISE_RUNS, WEIGHT_DTYPES, make_accelerator

logger = get_logger(__name__)

REPORT_NAME = "report.json"
# Settings that a target reads.
_OF_TARGET = {
    "reward": ("ascent_steps", "ascent_rate", "gradient_steps"),
    "best_of_n": ("best_of", "spread"),
    "diversity": ("ascent_steps", "ascent_rate", "diversity_gain"),
}


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
    """Make shards of `shard_size` of all candidates, batch by batch; what is there is not made again.

    `shards` are the numbers of those to be made here. Returns how many candidates were tried here.
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


def prepare_pair_upload(settings: PairSettings, facts: Mapping[str, Any], latent_shape: Sequence[int]) -> None:
    """Make the repository and let the Hub read a card before the set is made, not after it."""
    counts = {"num_pairs": 0, "num_rejected": 0, "num_steps": settings.num_steps}
    card = pair_set_card(facts, latent_shape=latent_shape, **counts, **card_arguments(settings))
    check_card(card("user/name"))
    make_repository(repository_name(settings), repo_type="dataset", **upload_arguments(settings))


def publish_pairs(settings: PairSettings) -> str:
    """Upload the finished set of the output folder; returns the address of the commit."""
    pairs = PairDataset(settings.output_dir, verify=False)  # written by this run
    commit = pairs.push_to_hub(repository_name(settings), **{**card_arguments(settings), **upload_arguments(settings)})
    logger.info(f"Uploaded to {commit}")
    return commit


def summarize(folder: str | os.PathLike, this_run: dict[str, Any]) -> dict[str, Any]:
    """Counts, rewards and noise of a set, of kept and of rejected pairs together and apart."""
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


def check_report(folder: str | os.PathLike) -> None:
    """Raise `ValueError` where a generation has ended without a pair."""
    report = read_json(Path(folder, REPORT_NAME), allow_nan=True)
    if not report["kept"]:
        raise ValueError(
            f"`margin` must let at least one pair pass, got none of {report['tried']}: the highest "
            f"gain is {report['highest_gain']:.4g}. Lower `--margin`, or try more prompts or "
            f"`--noises_per_prompt`. All scores are in {Path(folder, 'rejected')}."
        )


def _noise(records: list[PairRecord]) -> dict[str, float]:
    names = ("mean", "std", "kurtosis", "lag1_correlation")
    return {name: fmean(getattr(record, name) for record in records) for name in names if records}


def parse_args(input_args: Sequence[str] | None = None) -> PairSettings:
    """Command line of this script, over the YAML file of `--config`."""
    return parse_settings(PairSettings, __doc__, input_args, shared=GOLDEN_NOISE_RUNS)


def read_prompts(settings: PairSettings) -> list[str]:
    """The different prompts of `--prompt_file`, at most `--max_prompts`."""
    lines = read_prompt_texts(settings.prompt_file, settings.prompt_column, argument="prompt_file")
    return list(dict.fromkeys(lines))[: settings.max_prompts]


def generation_facts(
    settings: PairSettings, prompts: Sequence[str], pipeline: DiffusionPipeline, reward: Reward | None
) -> dict[str, Any]:
    """What must be equal for a set to be continued, and what a user of it wants to know."""
    names = (
        "pretrained_model_name_or_path", "revision", "variant", "mixed_precision", "seed",
        "num_steps", "redenoise_steps", "w1", "w2", "legacy_inversion", "negative_prompt",
        "noises_per_prompt", "batch_size", "shard_size",
    )  # fmt: skip
    drawn = ("num_inference_steps", "guidance_scale", "margin")
    facts = {name: getattr(settings, name) for name in names + (drawn if reward else ())}
    if settings.target == "diversity":  # whose first step it is, also where no picture is drawn
        facts |= {name: getattr(settings, name) for name in drawn[:2]}
    if settings.single_file_config is not None:  # of progress written before there was none
        facts["single_file_config"] = settings.single_file_config
    if settings.target != "guidance":  # of progress written before there were others
        facts |= {name: getattr(settings, name) for name in ("target", "no_filter", *_OF_TARGET[settings.target])}
    facts["reward"] = None if reward is None else {"name": reward.name, "version": reward.version}
    text = "\n".join(prompts).encode()
    facts["prompts"] = {"count": len(prompts), "sha256": hashlib.sha256(text).hexdigest()}
    facts["pipeline"] = type(pipeline).__name__
    facts["scheduler"] = {
        "_class_name": type(pipeline.scheduler).__name__,
        **{k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")},
    }
    facts["models"] = {
        name: fingerprint(component)
        for name, component in pipeline.components.items()
        if isinstance(component, torch.nn.Module) and (reward or name != "vae")
    }
    return json.loads(json.dumps(facts, default=str))


def open_set(settings: PairSettings, writer: PairWriter, accelerator: Accelerator) -> list[int]:
    """Start the set or check the one that is to be continued; the shards left for this process."""
    if accelerator.is_main_process and settings.resume_from_checkpoint is None:
        if settings.overwrite_output_dir:
            writer.discard()
        writer.create()
    accelerator.wait_for_everyone()
    if settings.resume_from_checkpoint is not None:
        check_same_facts(read_config(settings.output_dir)["facts"], writer.facts, writer.folder)
        if accelerator.is_main_process:
            writer.check()
    left = writer.open_shards()
    accelerator.wait_for_everyone()  # nobody finishes one before all have looked
    return left[accelerator.process_index :: accelerator.num_processes]


def check_resume(settings: PairSettings) -> None:
    """Raise `ValueError` where the output folder contradicts `--resume_from_checkpoint`."""
    there = Path(settings.output_dir, CONFIG_NAME).exists()
    if there and settings.resume_from_checkpoint is None:
        if settings.overwrite_output_dir:
            read_config(settings.output_dir)  # only a set of noises gives way to another
            return
        raise ValueError(
            f"`output_dir` must hold no pairs of an earlier run, got some in {settings.output_dir}. "
            "Pass `--resume_from_checkpoint latest` to continue it or `--overwrite_output_dir` to "
            "replace it, or choose another folder."
        )
    if not there and settings.resume_from_checkpoint is not None:
        raise ValueError(
            "`resume_from_checkpoint` must find the pairs of a stopped run, got 'latest' but "
            f"{settings.output_dir} holds none. Start without the flag."
        )


def finish(settings: PairSettings, writer: PairWriter, accelerator: Accelerator, tried: int, seconds: float) -> None:
    """Clear away the progress, write the report and log what it says."""
    writer.clean_up()
    this_run = {
        "tried": tried,
        "seconds": seconds,
        "pairs_per_second": tried / seconds,
        "num_processes": accelerator.num_processes,
    }
    report = summarize(settings.output_dir, this_run)
    won = f", win rate {report['win_rate']:.3f}" if "win_rate" in report else ""
    logger.info(
        f"Kept {report['kept']} of {report['tried']} pairs{won}, {tried} of them made now at "
        f"{tried / seconds:.3g} a second; wrote {settings.output_dir}. {pairs_words(settings)}"
    )
    write_atomically(Path(settings.output_dir, REPORT_NAME), json.dumps(report, indent=2) + "\n")


@one_run_a_folder
def main(settings: PairSettings) -> Path:
    """Generate; returns the output folder."""
    prompts = read_prompts(settings)
    check_resume(settings)
    accelerator = make_accelerator(settings)
    if settings.push_to_hub and accelerator.is_main_process:
        check_login(settings)
    reward = None
    if settings.needs_reward:
        reward = load_reward(
            settings.reward, model=settings.reward_model, version=settings.reward_version, device=accelerator.device
        )
    if settings.target == "reward":
        check_differentiable(reward)
    pipeline = load_base_pipeline(settings, accelerator.device, WEIGHT_DTYPES[settings.mixed_precision])
    shape = square_latent_shape(pipeline, settings.output_size)
    candidates = list_candidates(prompts, settings.noises_per_prompt, settings.seed)
    num_shards = -(-len(candidates) // settings.shard_size)
    facts = generation_facts(settings, prompts, pipeline, reward)
    if settings.push_to_hub and accelerator.is_main_process:
        prepare_pair_upload(settings, facts, shape)
    writer = PairWriter(settings.output_dir, shape, settings.num_steps, num_shards, facts)
    shards = open_set(settings, writer, accelerator)
    make = PairMaker(pipeline, shape, settings, reward).make
    began = time.perf_counter()
    tried = generate(
        writer,
        shards,
        candidates,
        make,
        shard_size=settings.shard_size,
        batch_size=settings.batch_size,
        show_progress=accelerator.is_local_main_process,
    )
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - began
    tried = int(accelerator.reduce(torch.tensor(tried, device=accelerator.device)))
    if accelerator.is_main_process:
        finish(settings, writer, accelerator, tried, seconds)
    accelerator.wait_for_everyone()
    check_report(settings.output_dir)
    if settings.push_to_hub and accelerator.is_main_process:
        publish_pairs(settings)
    accelerator.end_training()
    return Path(settings.output_dir)


if __name__ == "__main__":
    run_script(parse_args, main, PairSettings)
