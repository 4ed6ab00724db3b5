"""The training step of null-space DreamBooth: the denoising loss on cached latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import DiffusionPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, compute_snr
from torch.nn import functional
from torch.utils.data import TensorDataset

from diffusers_ext.core.seeds import check_min_snr, check_prediction_type, draw_rows, training_schedule
from diffusers_ext.families.family import Family
from diffusers_ext.families.predictions import predicted_of, scheduler_level
from diffusers_ext.families.text_conditioning import TextConditioning
from diffusers_ext.nullspace.lora import preservation_penalty
from diffusers_ext.nullspace.settings import GUIDANCE, WEIGHTING_SCHEMES
from diffusers_ext.nullspace.statistics import FeatureStatistics

_MODE_SCALE = 1.29  # of the mode distribution, as in diffusers and in Stable Diffusion 3 (arXiv 2403.03206, 3.1)


class Noised(NamedTuple):
    """A batch as the model is asked about it."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor | None  # of each sample's error; 1 where there are none


@dataclass(frozen=True)
class FlowSchedule:
    """How often a flow-matching model sees which level of noise, and how much it counts.

    Args:
        sigmas: shares of noise of all timesteps, descending from 1, with the model's own shift.
        weighting_scheme: one of `WEIGHTING_SCHEMES`. `"logit_normal"` over shifted levels is how the published models
            were trained (Stable Diffusion 3, arXiv 2403.03206, section 3.1; FLUX.1, arXiv 2506.15742, appendix A.2).
    """

    sigmas: torch.Tensor
    weighting_scheme: str = "logit_normal"

    def __post_init__(self) -> None:
        if self.weighting_scheme not in WEIGHTING_SCHEMES:
            raise ValueError(
                f"`weighting_scheme` must be one of {list(WEIGHTING_SCHEMES)}, got {self.weighting_scheme!r}."
            )

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, generator: torch.Generator) -> Noised:
        """Points of straight paths from noise to latents; the model is to tell `noise - latents`."""
        count, steps = len(latents), len(self.sigmas)
        options = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": _MODE_SCALE}

        def draw(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
            return compute_density_for_timestep_sampling(
                self.weighting_scheme, shape[0], **options, generator=generator
            )

        drawn = draw_rows(draw, (count,), generator)
        sigmas = self.sigmas[(drawn * steps).long().clamp_max(steps - 1)].to(latents.device)
        weights = compute_loss_weighting_for_sd3(self.weighting_scheme, sigmas)
        shares = sigmas.view(-1, *[1] * (latents.ndim - 1))
        return Noised((1 - shares) * latents + shares * noise, sigmas * steps, noise - latents, weights)


def flow_schedule(
    family: Family,
    scheduler: Any,
    image_tokens: int,
    *,
    num_inference_steps: int = 50,
    weighting_scheme: str = "logit_normal",
) -> FlowSchedule:
    """The levels that a flow-matching model is trained at, shifted as its scheduler shifts those of a run.

    Args:
        image_tokens: of one picture, which a dynamic shift depends on.
        num_inference_steps: of the run, which that of some models depends on as well.

    Raises:
        ValueError: a scheduler of another kind.
    """
    config = scheduler.config
    is_flow = hasattr(scheduler, "sigmas") and (
        config.get("use_flow_sigmas") or config.get("prediction_type") in ("flow_prediction", None)
    )
    if not is_flow or not hasattr(config, "num_train_timesteps"):
        raise ValueError(
            f"`scheduler` must be a flow-matching one for {family.title}, got a {type(scheduler).__name__}. Put the "
            "model's own there."
        )
    steps = config.num_train_timesteps
    sigmas = torch.arange(steps, 0, -1, dtype=torch.float32) / steps
    if config.get("use_dynamic_shifting"):
        shift = family.grid_arguments(config, num_inference_steps, image_tokens)["mu"]
        shift = shift if config.get("time_shift_type") == "linear" else math.exp(shift)
    else:
        shift = config.get("shift", config.get("flow_shift", 1.0))
    return FlowSchedule(shift * sigmas / (1 + (shift - 1) * sigmas), weighting_scheme)


def schedule_of(pipeline: DiffusionPipeline, family: Family, resolution: int | tuple[int, int], **flow: Any) -> Any:
    """How a pipeline's model is trained on pictures of a size, `(height, width)` or the side of a square.

    `flow` is as of `flow_schedule`.
    """
    if not family.flow_matching:
        return training_schedule(pipeline.scheduler)
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    token = family.pixels_per_latent(pipeline) * family.patch(getattr(pipeline, family.denoiser).config)
    return flow_schedule(family, pipeline.scheduler, (height // token) * (width // token), **flow)


class _Standing:
    """An object of which something stands in the place of an attribute, and all else is its own."""

    def __init__(self, owner: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes, _owner=owner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner, name)


class _Wrapped(_Standing):
    """A model that is wrapped for training: called as it is, asked as the model inside."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(*args, **kwargs)


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told for one prompt or for several, and how its family calls it.

    Args:
        pipeline: asked for sizes and what else the family's call needs, not for its denoiser.
        guidance_scale: what a model is told that takes it as an input (FLUX.1-dev).
    """

    text: TextConditioning
    family: Family
    pipeline: Any
    guidance_scale: float = GUIDANCE

    def of_samples(self, count: int, index: torch.Tensor | None) -> TextConditioning:
        """The text of each sample of a batch, by the index of its prompt where there are several."""
        text = self.text if index is None else self.text[index.to(self.text.prompt_embeds.device)]
        return text if len(text) == count else text.expand(count)

    def predict(
        self, model: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, text: TextConditioning
    ) -> torch.Tensor:
        """The prediction of the model that trains, wrapped or not, in the place of the pipeline's denoiser."""
        plain = extract_model_from_parallel(model, keep_torch_compile=True)
        denoiser = model if plain is model else _Wrapped(plain, _wrapped=model)
        pipeline = _Standing(self.pipeline, **{self.family.denoiser: denoiser})
        return self.family.predict(pipeline, latents, timesteps, text, self.guidance_scale)


@dataclass(frozen=True)
class DreamBoothLoss:
    """The denoising loss on the subject's pictures, with prior preservation where there are pictures of the class.

    Args:
        scheduler: as of `schedule_of`.
        instance: condition of the instance prompt; of all prompts of the pictures where the batches have an index
            beside mean and standard deviation, as `with_prompts` gives them.
        snr_gamma: Min-SNR weighting (arXiv 2303.09556) when given; it has no meaning for flow matching.
        by_size: schedules by height and width of latents, in the place of `scheduler` where sizes differ.
    """

    scheduler: Any
    instance: Condition
    class_latents: TensorDataset | None = None
    class_condition: Condition | None = None
    prior_loss_weight: float = 1.0
    snr_gamma: float | None = None
    by_size: Mapping[tuple[int, int], FlowSchedule] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scheduler, FlowSchedule):
            check_prediction_type(self.scheduler)
            check_min_snr(self.scheduler, self.snr_gamma)
        elif self.snr_gamma is not None:
            raise ValueError(
                f"`snr_gamma` must be None for a flow-matching model, got {self.snr_gamma}. Its `weighting_scheme` "
                "weighs levels of noise."
            )

    def __call__(
        self, model: torch.nn.Module, batch: list[torch.Tensor], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Losses `loss` and `instance`, and `prior` with prior preservation."""
        instance = self._denoising_loss(model, batch, self.instance, generator)
        losses = {"loss": instance, "instance": instance}
        if self.class_latents is not None:
            picks = draw_rows(partial(torch.randint, len(self.class_latents)), (len(batch[0]),), generator)
            prior = self._denoising_loss(model, list(self.class_latents[picks]), self.class_condition, generator)
            losses.update(loss=instance + self.prior_loss_weight * prior, prior=prior)
        return losses

    def _denoising_loss(
        self, model: torch.nn.Module, batch: list[torch.Tensor], condition: Condition, generator: torch.Generator
    ) -> torch.Tensor:
        embeds = condition.text.prompt_embeds
        mean, std = (part.to(embeds.device) for part in batch[:2])
        text = condition.of_samples(len(mean), batch[2] if len(batch) > 2 else None)
        latents = mean + std * draw_rows(torch.randn, mean.shape, generator).to(embeds.device)
        noise = draw_rows(torch.randn, mean.shape, generator).to(embeds.device)
        noised = self._noised(latents, noise, generator)
        prediction = condition.predict(model, noised.latents.to(embeds.dtype), noised.timesteps, text).float()
        errors = functional.mse_loss(prediction, noised.target, reduction="none")
        errors = errors.mean(dim=tuple(range(1, errors.ndim)))
        return (errors if noised.weights is None else errors * noised.weights).mean()

    def _noised(self, latents: torch.Tensor, noise: torch.Tensor, generator: torch.Generator) -> Noised:
        if isinstance(self.scheduler, FlowSchedule):
            schedule = self.by_size[latents.shape[2], latents.shape[3]] if self.by_size else self.scheduler
            return schedule.noised(latents, noise, generator)
        limit = self.scheduler.config.num_train_timesteps
        timesteps = draw_rows(partial(torch.randint, limit), (len(latents),), generator).to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        kind = self.scheduler.config.prediction_type
        target, weights = noise, None
        if kind != "epsilon":
            target = predicted_of(latents, noise, scheduler_level(self.scheduler, timesteps, latents), kind)
        if self.snr_gamma is not None:
            snr = compute_snr(self.scheduler, timesteps)
            weights = snr.clamp(max=self.snr_gamma) / (snr if kind == "epsilon" else snr + 1)
        return Noised(noisy, timesteps, target, weights)


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
