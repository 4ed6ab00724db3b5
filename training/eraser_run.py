"""The training of an eraser over its data: the adapter, the loss and the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler

from diffusers_ext.eraser.attack import AdversarialPrompts
from diffusers_ext.eraser.batch import RowMaker
from diffusers_ext.eraser.config import EraserConfig
from diffusers_ext.eraser.outputs import trainable_eraser_parameters
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.rollouts import OnPolicyRollouts
from diffusers_ext.eraser.step import EraserStep
from diffusers_ext.families.registry import find_family
from training.eraser_data import ClipSize, EraserData, make_data
from training.eraser_prompts import EraserPrompts
from training.loop import LoopSettings, TrainingLoop


@dataclass(frozen=True)
class TrainedEraser:
    """What a training leaves besides the adapter.

    Attributes:
        history: losses by step.
        seconds: of the loop.
        data: for further trainings on the same samples.
    """

    history: list[dict[str, float]]
    seconds: float
    data: EraserData


def add_eraser(
    transformer: torch.nn.Module,
    recipe: EraserTraining,
    adapter_name: str = "default",
    *,
    concept: str | None = None,
    anchor_concept: str | None = None,
) -> list[torch.nn.Parameter]:
    """Put a new eraser into a transformer; returns its parameters, the only ones that train."""
    config = EraserConfig(r=recipe.rank, concept=concept, anchor_concept=anchor_concept)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        transformer.add_adapter(config, adapter_name)
    parameters = trainable_eraser_parameters(transformer, adapter_name)
    transformer.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def make_step(
    pipeline: DiffusionPipeline,
    data: EraserData,
    recipe: EraserTraining,
    device: torch.device,
    adapter_name: str = "default",
) -> EraserStep:
    """The loss function of a training."""
    transformer = pipeline.transformer
    family = find_family(pipeline, "eraser")
    shape = family.latent_shape(transformer.config, pipeline.vae.config, *data.size)
    velocity = family.velocity(pipeline, *data.size)
    maker = RowMaker(
        velocity,
        data.text,
        recipe,
        device,
        grid=family.token_grid(transformer.config, shape),
        scheduler=pipeline.scheduler,
        token_mask=data.token_mask,
        head_weights=getattr(data.samples, "head_weights", None),
    )
    rollouts, adversarial_prompts = None, None
    if recipe.on_policy_share:
        rollouts = OnPolicyRollouts(pipeline, data.text, recipe, shape, data.size._asdict())
    if recipe.adversarial_share:
        adversarial_prompts = AdversarialPrompts(velocity, recipe)
    return EraserStep(
        maker, recipe, adapter_name, rollouts=rollouts, adversarial_prompts=adversarial_prompts
    )


def train_eraser(
    pipeline: DiffusionPipeline,
    prompts: EraserPrompts,
    recipe: EraserTraining,
    *,
    size: ClipSize | None = None,
    concept: str | None = None,
    anchor_concept: str | None = None,
    adapter_name: str = "default",
    data: EraserData | None = None,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> TrainedEraser:
    """Train an eraser; it stays in `pipeline.transformer`, in eval mode and switched on.

    Args:
        pipeline: the base model, where it is to be trained.
        prompts: target, anchor and preserved prompts.
        recipe: how.
        size: of the clips; the model's own when `None`.
        concept: what is erased, for the adapter's config and for masks.
        anchor_concept: what stands in its place, for the adapter's config.
        adapter_name: of the eraser.
        data: of an earlier call with the same prompts, size and sampling, to be used again.
        accelerator: on the pipeline's device, in full precision, when `None`.
        options: of `make_samples`.
    """
    transformer = pipeline.transformer
    size = (
        ClipSize.of_configs(find_family(pipeline, "eraser"), transformer, pipeline.vae)
        if size is None
        else size
    )
    if data is None:
        data = make_data(pipeline, prompts, recipe, size, concept=concept, **options)
    if accelerator is None:
        accelerator = Accelerator(
            cpu=transformer.device.type == "cpu",
            gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        )
    parameters = add_eraser(
        transformer, recipe, adapter_name, concept=concept, anchor_concept=anchor_concept
    )
    settings = LoopSettings(
        max_train_steps=recipe.max_train_steps,
        train_batch_size=recipe.train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        description="eraser training",
    )
    optimizer = torch.optim.AdamW(
        parameters, recipe.learning_rate, weight_decay=recipe.adam_weight_decay
    )
    loop = TrainingLoop(
        accelerator,
        transformer,
        optimizer,
        data.samples,
        make_step(pipeline, data, recipe, accelerator.device, adapter_name),
        settings,
        get_scheduler(
            recipe.lr_scheduler,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=recipe.max_train_steps,
        ),
    )
    try:
        loop.run()
    finally:
        pipeline.transformer = accelerator.unwrap_model(
            loop.model, keep_fp32_wrapper=False, keep_torch_compile=False
        )
        transformer.requires_grad_(False).eval()
    return TrainedEraser(loop.history, loop.seconds, data)
