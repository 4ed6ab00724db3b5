"""What a null-space DreamBooth does again and again: statistics, training steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from diffusers import DDPMScheduler
from torch.utils.data import TensorDataset

from diffusers_ext.core.capture import capture
from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.golden_noise.denoiser import guided_prediction
from diffusers_ext.nullspace.projector import ProjectedUpdate
from diffusers_ext.nullspace.step import Condition, DreamBoothLoss, SoftLoss
from diffusers_ext.planning.image_shapes import ImageShapes
from diffusers_ext.planning.nullspace_setting import NullSpaceSetting
from diffusers_ext.planning.nullspace_unet import (
    covered_linears,
    empty_statistics,
    trained_unet,
)
from diffusers_ext.planning.work import Job, Precision, Update, Work, training_works


OPTIMIZER, STATISTICS = "optimizer", "statistics"
_TIMESTEP = 500


def text_moment_work(shapes: ImageShapes, rows: int, times: float, precision: Precision) -> Work:
    """Second moments of the embeddings of `rows` prompts."""

    def begin(device: torch.device) -> Callable[[], object]:
        size = (rows, shapes.text.tokens, shapes.text.width)
        embeddings = torch.randn(size, dtype=precision.dtype, device=device)
        moment = SecondMoment(shapes.text.width, device, torch.float64)
        return lambda: moment.update(embeddings)

    return Work("text's second moments", times, lambda: Job([], begin))


def trajectory_work(
    shapes: ImageShapes, setting: NullSpaceSetting, times: float, precision: Precision
) -> Work:
    """A denoiser call of a denoising run, whose features are counted."""

    def make() -> Job:
        pipeline = shapes.pipeline(precision.dtype, torch.float32)
        unet = pipeline.unet
        covered = covered_linears(unet, setting)
        modules = dict(unet.named_modules())
        targets = {key: modules[name] for key, name in covered.readers.items()}

        def begin(device: torch.device) -> Callable[[], object]:
            moments = {key: SecondMoment(covered.widths[key], device) for key in targets}
            rows = setting.statistics_batch_size
            latents = torch.randn(rows, *shapes.latents, device=device)
            text = shapes.conditioning(rows, device, precision.dtype)

            @torch.no_grad()
            def repeat() -> None:
                with capture(unet, targets, lambda key, x: moments[key].update(x)):
                    guided_prediction(pipeline, latents, _TIMESTEP, text, setting.guidance_scale)

            return repeat

        return Job([unet, pipeline.vae], begin)

    return Work("denoiser's activations", times, make, STATISTICS)


def nullspace_training(
    shapes: ImageShapes, setting: NullSpaceSetting, precision: Precision
) -> list[Work]:
    """The training's own step over latents without content."""
    soft = setting.directions == "soft" and not setting.full_finetune
    rows, schedule = setting.train_batch_size, DDPMScheduler()
    # They do not change with the blocks: all that have one are covered.
    covered = trained_unet(shapes.base, setting, precision.dtype)[2] if soft else None

    def begin(unet: torch.nn.Module, device: torch.device) -> Callable[[], torch.Tensor]:
        def latents() -> list[torch.Tensor]:
            return [torch.zeros(rows, *shapes.latents, device=device) for _ in range(2)]

        text, added = shapes.conditioning(1, device, precision.dtype), {}
        if text.pooled_prompt_embeds is not None:
            ids = torch.zeros(1, 6, dtype=precision.dtype, device=device)
            added = {"text_embeds": text.pooled_prompt_embeds, "time_ids": ids}
        condition, prior = Condition(text.prompt_embeds, added), {}
        if setting.with_prior_preservation:
            prior = {"class_latents": TensorDataset(*latents()), "class_condition": condition}
        step = DreamBoothLoss(schedule, condition, **prior)
        if soft:
            statistics = empty_statistics(covered.sources, covered.widths, device)
            step = SoftLoss(step, statistics, 1.0)
        batch = latents()
        return lambda: step(unet, batch, torch.Generator())["loss"]

    def update(optimizer: torch.optim.Optimizer, device: torch.device) -> Update:
        if not setting.full_finetune:
            return nullcontext
        projections = _projections(optimizer.param_groups[0]["params"], device)
        return lambda: ProjectedUpdate(optimizer, projections)

    def build() -> torch.nn.Module:
        return trained_unet(shapes.base, setting, precision.dtype)[0]

    work = Work("activations and gradients", setting.max_train_steps, build, OPTIMIZER)
    batches = setting.gradient_accumulation_steps
    return training_works(work, batches, precision, begin, update=update)


def _projections(
    weights: list[torch.nn.Parameter], device: torch.device
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """A projection for each weight; those of one width share it, as Linears with one input do."""
    widths = {weight.shape[1] for weight in weights}
    shared = {n: torch.zeros(n, n, dtype=torch.float64, device=device) for n in widths}
    return {weight: shared[weight.shape[1]] for weight in weights}
