"""What a golden-noise network itself gains: its pictures and the plain ones of many prompts and seeds, judged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from diffusers_ext.core.artifacts import CONFIG_NAME, fingerprint, folder_lock
from diffusers_ext.core.text_files import read_prompt_texts
from diffusers_ext.evaluation.golden_noise import NetworkRefiner
from diffusers_ext.evaluation.judges import load_reward
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork
from diffusers_ext.golden_noise.noise_statistics import noise_statistics
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from diffusers_ext.golden_noise.pairs.shards import PairRecord, PairWriter, Part, read_config
from diffusers_ext.golden_noise.redenoise import encode_prompts
from diffusers_ext.rewards.reward import Reward, checked_scores
from diffusers_ext.training.golden_noise.candidates import Candidate, list_candidates
from diffusers_ext.training.golden_noise.guard_settings import GuardTrainingSettings
from diffusers_ext.training.golden_noise.rendering import render, square_latent_shape
from diffusers_ext.training.pairs import generate
from diffusers_ext.training.run.checkpoint_files import check_same_facts


class GainMaker:
    """Judges batches of candidates with and without a network; nothing but the batch decides the result."""

    def __init__(
        self, pipeline: DiffusionPipeline, network: GoldenNoiseNetwork, reward: Reward,
        shape: Sequence[int], settings: GuardTrainingSettings,
    ) -> None:  # fmt: skip
        self.pipeline, self.refine, self.reward = pipeline, NetworkRefiner(network), reward
        self.shape, self.settings = tuple(shape), settings

    @torch.no_grad()
    def make(self, batch: Sequence[Candidate]) -> Part:
        """Two pictures a candidate, in one call of the pipeline; of the noises only the seeds are kept."""
        prompts = [candidate.prompt for candidate in batch]
        different = list(dict.fromkeys(prompts))
        text = encode_prompts(self.pipeline, different, self.settings.negative_prompt or None)
        text = text[[different.index(prompt) for prompt in prompts]]
        noise = torch.stack([source_noise(candidate.seed, self.shape) for candidate in batch])
        golden = self.refine(noise.to(self.pipeline._execution_device), text).cpu()
        seeds = [candidate.sampling_seed for candidate in batch] * 2
        images = render(
            self.pipeline, torch.cat([noise, golden]), text[[*range(len(batch))] * 2], self.settings, seeds
        )
        before, after = checked_scores(self.reward, images, prompts * 2).view(2, -1).tolist()
        statistics = zip(*(column.tolist() for column in noise_statistics(golden)), strict=True)
        judged = [
            PairRecord(candidate.index, candidate.prompt, candidate.seed, *rewards, *of_noise)
            for candidate, *rewards, of_noise in zip(batch, before, after, statistics, strict=True)
        ]
        return Part(torch.zeros(0, 1, *self.shape), [], judged)


def measure_gains(
    settings: GuardTrainingSettings, pipeline: DiffusionPipeline, network: GoldenNoiseNetwork, accelerator: Accelerator
) -> None:
    """Judge the network on `--prompt_file`, into `--dataset_dir`; what lies there of it is not judged again."""
    if accelerator.is_main_process:
        with folder_lock(settings.dataset_dir, "dataset_dir"):
            _measure(settings, pipeline, network, accelerator)
    else:
        _measure(settings, pipeline, network, accelerator)


def _measure(
    settings: GuardTrainingSettings, pipeline: DiffusionPipeline, network: GoldenNoiseNetwork, accelerator: Accelerator
) -> None:
    prompts = list(
        dict.fromkeys(read_prompt_texts(settings.prompt_file, settings.prompt_column, argument="prompt_file"))
    )
    shape = square_latent_shape(pipeline, settings.output_size)
    reward = load_reward(
        settings.reward, model=settings.reward_model, version=settings.reward_version, device=accelerator.device
    )
    candidates = list_candidates(prompts, settings.noises_per_prompt, settings.seed)
    facts = gain_facts(settings, pipeline, network, reward, prompts)
    folder, count = Path(settings.dataset_dir), -(-len(candidates) // settings.shard_size)
    writer = PairWriter(folder, shape, 1, count, facts)
    if accelerator.is_main_process:
        if (folder / CONFIG_NAME).is_file():
            check_same_facts(read_config(folder)["facts"] or {}, facts, folder)
            writer.check()
        else:
            writer.create()
    accelerator.wait_for_everyone()
    shards = writer.open_shards()
    accelerator.wait_for_everyone()  # nobody finishes one before all have looked
    own = shards[accelerator.process_index :: accelerator.num_processes]
    make = GainMaker(pipeline, network, reward, shape, settings).make
    sizes = {"shard_size": settings.shard_size, "batch_size": settings.batch_size}
    generate(writer, own, candidates, make, **sizes, show_progress=accelerator.is_local_main_process)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        writer.clean_up()
    accelerator.wait_for_everyone()


def gain_facts(
    settings: GuardTrainingSettings, pipeline: DiffusionPipeline, network: GoldenNoiseNetwork, reward: Reward,
    prompts: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """What must be equal for gains to be gone on with."""
    names = (
        "seed", "noises_per_prompt", "batch_size", "shard_size", "num_inference_steps", "guidance_scale",
        "negative_prompt", "mixed_precision",
    )  # fmt: skip
    models = {
        name: fingerprint(component)
        for name, component in pipeline.components.items()
        if isinstance(component, torch.nn.Module)
    }
    return {name: getattr(settings, name) for name in names} | {
        "target": "network",
        "network": fingerprint(network),
        "reward": {"name": reward.name, "version": reward.version},
        "prompts": {"count": len(prompts), "sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest()},
        "models": models,
    }
