"""The training step of null-space DreamBooth: the denoising loss on cached latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.training_utils import compute_snr
from torch.nn import functional
from torch.utils.data import TensorDataset

from diffusers_ext.core.seeds import check_min_snr, check_prediction_type
from diffusers_ext.families.predictions import predicted_of, scheduler_level
from diffusers_ext.nullspace.lora import preservation_penalty
from diffusers_ext.nullspace.statistics import FeatureStatistics


@dataclass(frozen=True)
class Condition:
    """What the UNet is told for one prompt, or for several."""

    prompt_embeds: torch.Tensor  # (prompts, tokens, width)
    added: dict[str, torch.Tensor]  # SDXL's pooled embeddings and sizes, a row a prompt; empty for Stable Diffusion

    def rows(self, index: torch.Tensor) -> Condition:
        """The condition of each sample of a batch, by the index of its prompt."""
        index = index.to(self.prompt_embeds.device)
        return Condition(self.prompt_embeds[index], {k: v[index] for k, v in self.added.items()})


@dataclass(frozen=True)
class DreamBoothLoss:
    """The denoising loss on the subject's pictures, with prior preservation where there are pictures of the class.

    Args:
        instance: condition of the instance prompt; of all prompts of the pictures where the batches have an index
            beside mean and standard deviation, as `with_prompts` gives them.
    """

    scheduler: Any  # as `training_schedule` makes it
    instance: Condition
    class_latents: TensorDataset | None = None
    class_condition: Condition | None = None
    prior_loss_weight: float = 1.0
    snr_gamma: float | None = None  # Min-SNR weighting (arXiv 2303.09556) when given

    def __post_init__(self) -> None:
        check_prediction_type(self.scheduler)
        check_min_snr(self.scheduler, self.snr_gamma)

    def __call__(
        self, model: torch.nn.Module, batch: list[torch.Tensor], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Losses `loss` and `instance`, and `prior` with prior preservation."""
        device = self.instance.prompt_embeds.device
        latents, condition = batch[:2], self.instance
        if len(batch) > 2:
            condition = condition.rows(batch[2])
        instance = self._denoising_loss(model, latents, condition, generator, device)
        losses = {"loss": instance, "instance": instance}
        if self.class_latents is not None:
            picks = torch.randint(len(self.class_latents), (len(batch[0]),), generator=generator)
            class_batch = list(self.class_latents[picks])
            prior = self._denoising_loss(model, class_batch, self.class_condition, generator, device)
            losses.update(loss=instance + self.prior_loss_weight * prior, prior=prior)
        return losses

    def _denoising_loss(
        self,
        model: torch.nn.Module,
        batch: list[torch.Tensor],
        condition: Condition,
        generator: torch.Generator,
        device: torch.device,
    ) -> torch.Tensor:
        mean, std = (part.to(device) for part in batch)
        latents = mean + std * torch.randn(mean.shape, generator=generator).to(device)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        count = len(mean)
        limit = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(limit, (count,), generator=generator).to(device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        embeds = condition.prompt_embeds.expand(count, -1, -1)
        added = {k: v.expand(count, -1) for k, v in condition.added.items()} or None
        dtype = embeds.dtype
        prediction = model(noisy.to(dtype), timesteps, embeds, added_cond_kwargs=added).sample.float()
        kind = self.scheduler.config.prediction_type
        target = noise
        if kind != "epsilon":
            target = predicted_of(latents, noise, scheduler_level(self.scheduler, timesteps, latents), kind)
        errors = functional.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
        if self.snr_gamma is not None:
            snr = compute_snr(self.scheduler, timesteps)
            weights = snr.clamp(max=self.snr_gamma) / (snr if kind == "epsilon" else snr + 1)
            errors = errors * weights
        return errors.mean()


@dataclass(frozen=True)
class SoftLoss:
    """The denoising loss plus `weight` times the drift of preserved outputs."""

    loss: DreamBoothLoss
    statistics: FeatureStatistics
    weight: float

    def __call__(
        self, model: torch.nn.Module, batch: list[torch.Tensor], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Losses of `DreamBoothLoss`, and `preservation`."""
        losses = self.loss(model, batch, generator)
        unet = extract_model_from_parallel(model, keep_torch_compile=False)
        penalty = preservation_penalty(unet, self.statistics)
        losses.update(loss=losses["loss"] + self.weight * penalty, preservation=penalty)
        return losses
