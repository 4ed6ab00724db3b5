"""Training a network by the reward itself: prompts in place of pairs, and pictures of them drawn in every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils.data import DataLoader, Dataset

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.text_files import read_prompt_texts
from diffusers_ext.evaluation.judges import load_reward
from diffusers_ext.evaluation.rendering import image_seed
from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.losses import pair_inputs
from diffusers_ext.golden_noise.noise_statistics import match_spectrum
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from diffusers_ext.golden_noise.reward_targets import RewardLoss
from diffusers_ext.golden_noise.text_cache import TextCache
from diffusers_ext.rewards.reward import DifferentiableReward, check_differentiable
from diffusers_ext.training.golden_noise.rendering import draw_with_gradient, load_base_pipeline, square_latent_shape
from diffusers_ext.training.golden_noise.result import NoiseValidation
from diffusers_ext.training.golden_noise.settings import PairNetworkSettings
from diffusers_ext.training.run.setup import WEIGHT_DTYPES

_NOISES = 8  # of a prompt that validation measures


class PromptNoises(Dataset):
    """Items as of `open_pairs`, several noises a prompt, whose golden noise is not known: it is the noise itself."""

    num_steps = 1

    def __init__(self, prompts: Sequence[str], latent_shape: Sequence[int], seed: int, facts: dict[str, Any]) -> None:
        self.prompts = [prompt for prompt in prompts for _ in range(_NOISES)]
        self.latent_shape, self.seed, self.facts = tuple(latent_shape), seed, facts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = image_seed(self.seed, self.prompts[index], index % _NOISES, "by reward")
        noise = source_noise(seed, self.latent_shape)
        return {"noise": noise, "golden": noise[None], "prompt": self.prompts[index]}


@dataclass(frozen=True)
class RewardTraining:
    """The frozen base model that draws and the reward that judges, of one training."""

    settings: PairNetworkSettings
    pipeline: DiffusionPipeline
    reward: DifferentiableReward

    @classmethod
    def load(cls, settings: PairNetworkSettings, device: torch.device) -> RewardTraining:
        """Both of them; `ValueError` for a reward without a gradient before the model is loaded."""
        reward = check_differentiable(
            load_reward(settings.reward, model=settings.reward_model, version=settings.reward_version, device=device)
        )
        pipeline = load_base_pipeline(settings, device, WEIGHT_DTYPES[settings.mixed_precision])
        if settings.gradient_checkpointing:
            denoiser_of(pipeline).enable_gradient_checkpointing()
        return cls(settings, pipeline, reward)

    def data(self, settings: PairNetworkSettings) -> PromptNoises:
        """The different prompts of `--prompt_file`, and what must be equal for the training to go on."""
        names = ("num_inference_steps", "guidance_scale", "negative_prompt", "reward_regularization", "gradient_steps")
        facts = {name: getattr(settings, name) for name in names}
        facts["reward"] = {"name": self.reward.name, "version": self.reward.version}
        facts["models"] = {
            name: fingerprint(component)
            for name, component in self.pipeline.components.items()
            if isinstance(component, torch.nn.Module)
        }
        lines = read_prompt_texts(settings.prompt_file, settings.prompt_column, argument="prompt_file")
        shape = square_latent_shape(self.pipeline, settings.output_size)
        return PromptNoises(list(dict.fromkeys(lines)), shape, settings.seed, facts)

    def loss(self, settings: PairNetworkSettings, cache: TextCache, device: torch.device) -> RewardLoss:
        """The loss of a batch."""
        return RewardLoss(
            cache, device, settings.model != "npnet", self.draw, self.reward.score_pixels,
            settings.reward_regularization, list(cache.rows),
        )  # fmt: skip

    def draw(self, noise: torch.Tensor, text: TextConditioning, seeds: Sequence[int]) -> torch.Tensor:
        """Pictures of noise, with a gradient where it has one."""
        text = text.to(self.pipeline.device, denoiser_of(self.pipeline).dtype)
        return draw_with_gradient(self.pipeline, noise, text, self.settings, seeds, self.settings.gradient_steps)

    def measure(
        self, network: torch.nn.Module, noise: torch.Tensor, text: TextConditioning, prompts: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards `(batch,)` of pictures of plain and of golden noise."""
        golden = network(noise, **pair_inputs(text, self.settings.model != "npnet")).float()
        drawn = [self.draw(x, text, range(len(noise))) for x in (noise, match_spectrum(golden, noise))]
        plain, refined = (self.reward.score_pixels(pixels, prompts).cpu() for pixels in drawn)
        return plain, refined


class RewardValidation(NoiseValidation):
    """As its base, by the reward: `<split>_reward`, `<split>_gain` over plain noise, `<split>_wins`, their share."""

    @torch.no_grad()
    def _measure_split(self, network: torch.nn.Module, split: str, samples: Dataset) -> dict[str, float]:
        device, found = self.accelerator.device, []
        names = {row: prompt for prompt, row in samples.dataset.text_rows.items()}
        for batch in DataLoader(samples, self.batch_size, generator=torch.Generator()):
            text = self.take_text(batch["text"], device)
            asked = [names[row] for row in batch["text"].tolist()]
            found.append(self.measure(network, batch["noise"].to(device), text, asked))
        plain, golden = (torch.cat(parts) for parts in zip(*found, strict=True))
        return {
            f"{split}_reward": golden.mean().item(),
            f"{split}_gain": (golden - plain).mean().item(),
            f"{split}_wins": (golden > plain).float().mean().item(),
        }
