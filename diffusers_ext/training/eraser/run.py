"""The training of an eraser over its data: the adapter, the loss and the loop."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.optimization import get_scheduler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffusers_ext.core.seeds import check_diffusion_levels
from diffusers_ext.eraser.adapter.config import EraserConfig, transformer_width
from diffusers_ext.eraser.adapter.outputs import trainable_eraser_parameters
from diffusers_ext.eraser.attack import AdversarialPrompts
from diffusers_ext.eraser.batch import RowMaker
from diffusers_ext.eraser.concepts import check_concept
from diffusers_ext.eraser.recipe import AUTO_ANCHOR, EraserSettings, EraserTraining
from diffusers_ext.eraser.step import EraserStep, OnPolicyRollouts
from diffusers_ext.families.base_source import refuse_single_file
from diffusers_ext.families.family import Family, import_class
from diffusers_ext.families.registry import families_of
from diffusers_ext.training.eraser.data import ClipSize, EraserData, make_data
from diffusers_ext.training.eraser.prompts import EraserPrompts
from diffusers_ext.training.run.base_model import read_components
from diffusers_ext.training.run.loop import LoopSettings, TrainingLoop
from diffusers_ext.training.run.setup import WEIGHT_DTYPES


@dataclass(frozen=True)
class BaseFacts:
    """What configs tell of a base model; they are read in no time, the weights in minutes."""

    transformer: SimpleNamespace  # with a `config` and no weights, as the VAE
    vae: SimpleNamespace
    tokenizer: PreTrainedTokenizerBase
    size: ClipSize  # of the clips to train on
    latent_shape: tuple[int, int, int, int]  # of these clips


def read_base(settings: EraserSettings) -> BaseFacts:
    """Read the configs of `--pretrained_model_name_or_path` and check the arguments against them.

    Raises:
        ValueError: no CogVideoX text-to-video pipeline, clips that it cannot take, a rank above its width, a scheduler
            of another prediction, or a concept that its tokenizer cannot spell.
    """
    family = read_video_family(settings)
    source, revision = settings.pretrained_model_name_or_path, settings.revision
    transformer, vae, scheduler = (
        SimpleNamespace(config=FrozenDict(model.load_config(source, subfolder=name, revision=revision)))
        for model, name in (
            (import_class(family.denoiser_class), "transformer"),
            (import_class(family.vae_class), "vae"),
            (DDIMScheduler, "scheduler"),  # every scheduler's config reads alike
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer", revision=revision)
    predicts = scheduler.config.get("prediction_type")
    if predicts != "v_prediction":
        raise ValueError(
            f"`prediction_type` of the scheduler must be 'v_prediction', as {family.title} has it, got {predicts!r}."
        )
    kind = getattr(diffusers, scheduler.config["_class_name"], None)
    if kind is not None:  # one of another library is met when it is loaded
        check_diffusion_levels(kind.from_config(scheduler.config))
    size = ClipSize.of_configs(family, transformer, vae, settings.num_frames, settings.height, settings.width)
    shape = family.latent_shape(transformer.config, vae.config, *size)
    family.token_grid(transformer.config, shape)
    width = transformer_width(transformer.config)
    if settings.rank > width:
        raise ValueError(f"`eraser_rank` must be at most the model's width, {width}, got {settings.rank}.")
    anchor = None if settings.anchor_concept == AUTO_ANCHOR else settings.anchor_concept
    for concept in (settings.target_concept, anchor):
        if concept is not None:
            check_concept(tokenizer, concept)
    return BaseFacts(transformer, vae, tokenizer, size, shape)


def read_video_family(settings: EraserSettings) -> Family:
    """The family of `--pretrained_model_name_or_path`, which must be one that an eraser is known for.

    Raises:
        ValueError: a single file, or another pipeline.
    """
    source, known = settings.pretrained_model_name_or_path, families_of("eraser")
    names = {family.pipelines[0]: family for family in known}
    refuse_single_file(source, f"a {' or '.join(names)}")
    kind = read_components(settings)["_class_name"]
    if kind not in names:
        raise ValueError(f"`pretrained_model_name_or_path` must be a {' or '.join(names)}, got a {kind} in {source}.")
    return names[kind]


def load_base(settings: EraserSettings, device: torch.device) -> DiffusionPipeline:
    """The base model without its text encoder, frozen, in the dtype of `--mixed_precision`.

    The VAE stays on the CPU: only videos and validation clips need it.
    """
    pipeline = DiffusionPipeline.from_pretrained(
        settings.pretrained_model_name_or_path,
        revision=settings.revision,
        variant=settings.variant,
        dtype=WEIGHT_DTYPES[settings.mixed_precision],
        text_encoder=None,
    )
    for model in (pipeline.transformer, pipeline.vae):
        model.requires_grad_(False).eval()
    pipeline.transformer.to(device)
    if settings.gradient_checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class TrainedEraser:
    """What a training leaves besides the adapter."""

    history: list[dict[str, float]]  # losses by step
    seconds: float  # of the loop
    data: EraserData  # for further trainings on the same samples


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
    shape, velocity = data.size.latent_shape(pipeline), data.size.velocity(pipeline)
    maker = RowMaker(
        velocity,
        data.text,
        recipe,
        device,
        grid=velocity.token_grid(shape),
        scheduler=pipeline.scheduler,
        token_mask=data.token_mask,
        head_weights=getattr(data.samples, "head_weights", None),
    )
    rollouts, adversarial_prompts = None, None
    if recipe.on_policy_share:
        rollouts = OnPolicyRollouts(pipeline, data.text, recipe, shape, data.size._asdict())
    if recipe.adversarial_share:
        adversarial_prompts = AdversarialPrompts(velocity, recipe)
    return EraserStep(maker, recipe, adapter_name, rollouts=rollouts, adversarial_prompts=adversarial_prompts)


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
        size: of the clips; the model's own when `None`.
        concept, anchor_concept: what is erased, for the adapter's config and for masks, and what stands in its place.
        data: of an earlier call with the same prompts, size and sampling, to be used again.
        accelerator: on the pipeline's device, in full precision, when `None`.
        options: of `make_samples`.
    """
    transformer = pipeline.transformer
    if data is None:
        size = ClipSize.of_pipeline(pipeline) if size is None else size
        data = make_data(pipeline, prompts, recipe, size, concept=concept, **options)
    if accelerator is None:
        accelerator = Accelerator(
            cpu=transformer.device.type == "cpu", gradient_accumulation_steps=recipe.gradient_accumulation_steps
        )
    parameters = add_eraser(transformer, recipe, adapter_name, concept=concept, anchor_concept=anchor_concept)
    settings = LoopSettings(
        max_train_steps=recipe.max_train_steps,
        train_batch_size=recipe.train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        description="eraser training",
    )
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.adam_weight_decay)
    loop = TrainingLoop(
        accelerator,
        transformer,
        optimizer,
        data.samples,
        make_step(pipeline, data, recipe, accelerator.device, adapter_name),
        settings,
        get_scheduler(recipe.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=recipe.max_train_steps),
    )
    try:
        loop.run()
    finally:
        pipeline.transformer = accelerator.unwrap_model(loop.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        transformer.requires_grad_(False).eval()
    return TrainedEraser(loop.history, loop.seconds, data)
