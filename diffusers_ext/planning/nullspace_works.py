"""What a null-space DreamBooth does again and again: statistics, training steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn import functional

from diffusers_ext.core.capture import capture
from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.golden_noise.denoiser import guided_prediction
from diffusers_ext.nullspace.lora import preservation_penalty
from diffusers_ext.nullspace.projected_update import ProjectedUpdate
from diffusers_ext.planning.image_shapes import ImageShapes
from diffusers_ext.planning.nullspace_setting import NullSpaceSetting
from diffusers_ext.planning.nullspace_unet import (
    covered_linears,
    empty_statistics,
    trained_unet,
)
from diffusers_ext.planning.work import Job, Precision, Work


OPTIMIZER, STATISTICS = "optimizer", "statistics"
_MAX_GRAD_NORM, _TIMESTEP = 1.0, 500


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


def training_works(
    shapes: ImageShapes, setting: NullSpaceSetting, precision: Precision
) -> list[Work]:
    """The optimizer's step with its last batch, and the batches before it."""
    steps, before = setting.max_train_steps, setting.gradient_accumulation_steps - 1

    def step() -> Job:
        return _training_job(shapes, setting, precision, updates=True)

    def batch() -> Job:
        return _training_job(shapes, setting, precision, updates=False)

    name = "activations and gradients"
    return [Work(name, steps, step, OPTIMIZER), Work(name, steps * before, batch, OPTIMIZER)]


def _training_job(
    shapes: ImageShapes, setting: NullSpaceSetting, precision: Precision, *, updates: bool
) -> Job:
    unet, trained, covered = trained_unet(shapes.base, setting, precision.dtype)
    soft = setting.directions == "soft" and not setting.full_finetune

    def begin(device: torch.device) -> Callable[[], object]:
        # On a GPU the optimizer works on all weights at once.
        optimizer = torch.optim.AdamW(
            _trained_again(unet, trained), weight_decay=0.0, foreach=precision.as_on_gpu
        )
        weights = optimizer.param_groups[0]["params"]
        make_state(optimizer)
        if setting.gradient_accumulation_steps > 1:
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
        statistics = empty_statistics(covered.sources, covered.widths, device) if soft else None
        projections = _projections(weights, device) if setting.full_finetune else {}
        batches = [
            _Batch(shapes, setting.train_batch_size, device, precision)
            for _ in range(2 if setting.with_prior_preservation else 1)
        ]

        def repeat() -> None:
            loss = sum(batch.loss(unet) for batch in batches)
            if statistics is not None:
                loss = loss + preservation_penalty(unet, statistics)
            loss.backward()
            if not updates:
                return
            torch.nn.utils.clip_grad_norm_(weights, _MAX_GRAD_NORM, foreach=precision.as_on_gpu)
            with ProjectedUpdate(optimizer, projections) if projections else nullcontext():
                optimizer.step()
            optimizer.zero_grad(set_to_none=setting.gradient_accumulation_steps == 1)

        return repeat

    return Job([unet], begin)


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer make its state, with gradients that are zero and go again."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()


class _Batch:
    """Latents of pictures, and the denoising loss on them."""

    def __init__(
        self, shapes: ImageShapes, rows: int, device: torch.device, precision: Precision
    ) -> None:
        text = shapes.conditioning(1, device, precision.dtype)
        self.rows, self.device, self.precision = rows, device, precision
        self.mean, self.std = (torch.zeros(rows, *shapes.latents, device=device) for _ in range(2))
        self.embeds, self.added = text.prompt_embeds, None
        if text.pooled_prompt_embeds is not None:
            ids = torch.zeros(1, 6, dtype=precision.dtype, device=device)
            self.added = {"text_embeds": text.pooled_prompt_embeds, "time_ids": ids}

    def loss(self, unet: torch.nn.Module) -> torch.Tensor:
        """Forward pass and mean squared error, as DreamBooth has it."""
        size = self.mean.shape
        latents = self.mean + self.std * torch.randn(size).to(self.device)
        noise = torch.randn(size).to(self.device)
        timesteps = torch.full((self.rows,), _TIMESTEP, device=self.device)
        noisy = 0.6 * latents + 0.8 * noise
        added = self.added and {n: t.expand(self.rows, -1) for n, t in self.added.items()}
        with self.precision.autocast(unet):
            prediction = unet(
                noisy.to(self.precision.dtype),
                timesteps,
                self.embeds.expand(self.rows, -1, -1),
                added_cond_kwargs=added,
            ).sample.float()
        errors = functional.mse_loss(prediction, noise, reduction="none").mean(dim=(1, 2, 3))
        return errors.mean()


def _trained_again(
    unet: torch.nn.Module, trained: list[torch.nn.Parameter]
) -> list[torch.nn.Parameter]:
    """The weights that train, which are other tensors once the model has data."""
    found = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    if len(found) != len(trained):
        raise ValueError(
            f"`unet` must train {len(trained)} weights, got {len(found)} that require a gradient."
        )
    return found


def _projections(
    weights: list[torch.nn.Parameter], device: torch.device
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """A projection for each weight; those of one width share it, as Linears with one input do."""
    widths = {weight.shape[1] for weight in weights}
    shared = {n: torch.zeros(n, n, dtype=torch.float64, device=device) for n in widths}
    return {weight: shared[weight.shape[1]] for weight in weights}
