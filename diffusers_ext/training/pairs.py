"""Make noise pairs (`--num_steps 1`) or sequences (more) whose golden noise suits its prompt.

    accelerate launch training/generate_npd.py \\
        --pretrained_model_name_or_path examples/digits/model --prompt_file prompts.txt \\
        --reward examples.digits.rewards:DigitsReward --num_inference_steps 6 \\
        --guidance_scale 1.5 --output_dir outputs/pairs
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline

from diffusers_ext.core.artifacts import CONFIG_NAME, fingerprint
from diffusers_ext.evaluation.judges import load_reward
from diffusers_ext.golden_noise.pairs.dataset import read_config
from diffusers_ext.golden_noise.pairs.writer import PairWriter
from diffusers_ext.golden_noise.settings import PairSettings
from diffusers_ext.rewards.reward import Reward
from diffusers_ext.training.golden_noise.pairs import (
    PairMaker,
    check_report,
    generate,
    list_candidates,
    prepare_pair_upload,
    publish_pairs,
    summarize,
    write_report,
)
from diffusers_ext.training.golden_noise.rendering import latent_shape, load_base_pipeline, read_prompt_file
from diffusers_ext.training.run.checkpoint_files import check_same_facts
from diffusers_ext.training.run.script import one_run_a_folder, pairs_words, run_script
from diffusers_ext.training.run.settings import parse_settings
from diffusers_ext.training.run.setup import GOLDEN_NOISE_RUNS, WEIGHT_DTYPES, make_accelerator
from diffusers_ext.training.run.upload import check_login

logger = get_logger(__name__)


def parse_args(input_args: Sequence[str] | None = None) -> PairSettings:
    """Command line of this script, over the YAML file of `--config`."""
    return parse_settings(PairSettings, __doc__, input_args, shared=GOLDEN_NOISE_RUNS)


def read_prompts(settings: PairSettings) -> list[str]:
    """The different prompts of `--prompt_file`, at most `--max_prompts`."""
    lines = read_prompt_file(settings.prompt_file, settings.prompt_column)
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
    if settings.single_file_config is not None:  # of progress written before there was none
        facts["single_file_config"] = settings.single_file_config
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


@one_run_a_folder
def main(settings: PairSettings) -> Path:
    """Generate; returns the output folder."""
    prompts = read_prompts(settings)
    check_resume(settings)
    accelerator = make_accelerator(settings)
    if settings.push_to_hub and accelerator.is_main_process:
        check_login(settings)
    pipeline = load_base_pipeline(settings, accelerator.device, WEIGHT_DTYPES[settings.mixed_precision])
    shape = latent_shape(pipeline, settings.output_size)
    reward = None
    if not settings.no_filter:
        reward = load_reward(
            settings.reward, model=settings.reward_model, version=settings.reward_version, device=accelerator.device
        )
    candidates = list_candidates(prompts, settings.noises_per_prompt, settings.seed)
    num_shards = -(-len(candidates) // settings.shard_size)
    facts = generation_facts(settings, prompts, pipeline, reward)
    if settings.push_to_hub and accelerator.is_main_process:
        prepare_pair_upload(settings, facts, shape)
    writer = PairWriter(settings.output_dir, shape, settings.num_steps, num_shards, facts)
    shards = open_set(settings, writer, accelerator)
    began = time.perf_counter()
    tried = generate(
        writer,
        shards,
        candidates,
        PairMaker(pipeline, shape, settings, reward).make,
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
    write_report(settings.output_dir, report)


if __name__ == "__main__":
    run_script(parse_args, main, PairSettings)
