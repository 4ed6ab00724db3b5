"""Train an eraser that takes one concept out of CogVideoX and leaves the rest, from prompts alone.

    accelerate launch training/train_cogvideox_eraser.py \\
        --pretrained_model_name_or_path examples/moving_digits/model \\
        --target_concept seven --anchor_concept auto --prompts_file prompts.txt \\
        --preserved_concepts_file digits.txt --eraser_rank 32 --learning_rate 5e-3 \\
        --train_batch_size 16 --max_train_steps 400 --output_dir outputs/eraser
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.optimization import get_scheduler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.core.seeds import check_diffusion_levels
from diffusers_ext.eraser.adapter.config import EraserConfig, transformer_width
from diffusers_ext.eraser.adapter.outputs import trainable_eraser_parameters
from diffusers_ext.eraser.attack import AdversarialPrompts
from diffusers_ext.eraser.batch import RowMaker
from diffusers_ext.eraser.concepts import check_concept
from diffusers_ext.eraser.recipe import AUTO_ANCHOR, EraserSettings, EraserTraining
from diffusers_ext.eraser.step import EraserStep, OnPolicyRollouts
from diffusers_ext.families import families_of
from diffusers_ext.families.base_source import refuse_single_file
from diffusers_ext.families.family import Family, import_class
from diffusers_ext.training.eraser.data import ClipSize, EraserData, concept_tokens, make_samples, samples_facts
from diffusers_ext.training.eraser.prompts import (
    EraserPrompts,
    GivenTexts,
    RunText,
    encode_run_text,
    encode_text,
    read_texts,
    settle_anchor,
)
from diffusers_ext.training.eraser.result import (
    ClipValidation,
    eraser_facts,
    eraser_report,
    prepare_eraser_upload,
    publish_eraser,
    save_result,
)
from diffusers_ext.training.run.base_model import read_components
from diffusers_ext.training.run.loop import LoopSettings, TrainingLoop
from diffusers_ext.training.run.script import card_record, check_login, eraser_words, one_run_a_folder
from diffusers_ext.training.run.settings import parse_settings
from diffusers_ext.training.run.setup import (
    ERASER_RUNS,
    WEIGHT_DTYPES,
    check_resume,
    make_accelerator,
    make_loop,
    make_output_dir,
    run_facts,
    start_trackers,
)

logger = get_logger(__name__)

ADAPTER_NAME = "default"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class BaseFacts:
    """What configs tell of a base model; they are read in no time, the weights in minutes."""

    transformer: SimpleNamespace  # with a `config` and no weights, as the VAE
    vae: SimpleNamespace
    tokenizer: PreTrainedTokenizerBase
    size: ClipSize  # of the clips to train on
    latent_shape: tuple[int, int, int, int]  # of these clips


def read_base(settings: EraserSettings) -> BaseFacts:
    """Read the configs of `--pretrained_model_name_or_path`; raises `ValueError` where the arguments do not fit it."""
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
    asked = {name: getattr(settings, name) for name in ClipSize._fields}
    size = ClipSize.of_configs(family, transformer, vae, **asked)
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
    """The family of `--pretrained_model_name_or_path`; raises `ValueError` where no eraser is known for it."""
    source, known = settings.pretrained_model_name_or_path, families_of("eraser")
    names = {family.pipelines[0]: family for family in known}
    refuse_single_file(source, f"a {' or '.join(names)}")
    kind = read_components(settings)["_class_name"]
    if kind not in names:
        raise ValueError(f"`pretrained_model_name_or_path` must be a {' or '.join(names)}, got a {kind} in {source}.")
    return names[kind]


def load_base(settings: EraserSettings, device: torch.device) -> DiffusionPipeline:
    """The base model without its text encoder, frozen; the VAE, which videos and validation read, on the CPU."""
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


def make_data(
    pipeline: DiffusionPipeline,
    prompts: EraserPrompts,
    recipe: EraserTraining,
    size: ClipSize,
    *,
    concept: str | None = None,
    **options: Any,
) -> EraserData:
    """Text and samples of a training; `options` are those of `make_samples`."""
    text = encode_text(pipeline, prompts)
    token_mask = concept_tokens(pipeline, prompts.target, recipe, concept)
    samples = make_samples(pipeline, text, token_mask, recipe, size, **options)
    return EraserData(text, token_mask, samples, size)


@dataclass(frozen=True)
class TrainedEraser:
    """What a training leaves besides the adapter."""

    history: list[dict[str, float]]  # losses by step
    seconds: float  # of the loop
    data: EraserData  # for further trainings on the same samples


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
        size: of the clips; the model's own when `None`.
        concept, anchor_concept: for the adapter's config and for masks.
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
        recipe.max_train_steps,
        recipe.train_batch_size,
        recipe.gradient_accumulation_steps,
        recipe.max_grad_norm,
        recipe.seed,
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


def parse_args(input_args: Sequence[str] | None = None) -> EraserSettings:
    """Command line of this script, over the YAML file of `--config`."""
    return parse_settings(EraserSettings, __doc__, input_args, shared=ERASER_RUNS)


def resume_facts(settings: EraserSettings, given: GivenTexts, base: BaseFacts) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued and is known before weights are loaded."""
    recipe = settings.recipe()
    del recipe["max_train_steps"]
    names = ("target_concept", "anchor_concept", "max_preserved_prompts", "trajectories_dtype")
    others = {name: getattr(settings, name) for name in names}
    return run_facts(settings, recipe=recipe, texts=asdict(given), size=list(base.size), **others)


def make_run_data(
    settings: EraserSettings, accelerator: Accelerator, pipeline: DiffusionPipeline, base: BaseFacts, text: RunText
) -> EraserData:
    """The samples of the run, made or read again."""
    collection: dict[str, Any] = {}
    token_mask = concept_tokens(pipeline, text.prompts.target, settings, settings.target_concept)
    if settings.latents_source == "video":
        pipeline.vae.to(accelerator.device)
        collection["video_dir"] = settings.video_dir
    elif settings.latents_source == "trajectory":
        collection["storage_dtype"] = _DTYPES[settings.trajectories_dtype]
    if settings.trajectories_dir is not None:
        collection |= {
            "directory": settings.trajectories_dir,
            "facts": {"prompts": text.prompts.facts, "text_dtype": str(text.embeds.target.dtype)},
            "process": (accelerator.process_index, accelerator.num_processes),
            "wait_for_everyone": accelerator.wait_for_everyone,
        }
    with accelerator.autocast():  # as the student runs, or the two would differ before any training
        samples = make_samples(pipeline, text.embeds, token_mask, settings, base.size, **collection)
    pipeline.vae.to("cpu")
    return EraserData(text.embeds, token_mask, samples, base.size)


def build_loop(
    settings: EraserSettings,
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    data: EraserData,
    facts: dict[str, Any],
    validation: ClipValidation,
) -> TrainingLoop:
    """The loop over a transformer, to which it adds an eraser."""
    concepts = {"concept": settings.target_concept, "anchor_concept": settings.anchor_concept}
    parameters = add_eraser(pipeline.transformer, settings, ADAPTER_NAME, **concepts)
    step = make_step(pipeline, data, settings, accelerator.device, ADAPTER_NAME)
    return make_loop(
        settings,
        accelerator,
        pipeline.transformer,
        data.samples,
        step,
        facts,
        "eraser training",
        parameters=parameters,
        validate=validation.draw if settings.validation_prompt else None,
        parts=step.stateful,
    )


@one_run_a_folder
def main(settings: EraserSettings) -> Path:
    """Train and save; returns the output folder."""
    settings.check_preserved()
    accelerator = make_accelerator(settings)
    base, given = read_base(settings), read_texts(settings)
    facts = resume_facts(settings, given, base)
    check_resume(settings, facts)
    if settings.push_to_hub and accelerator.is_main_process:
        check_login(settings)  # a missing login or licence stops the run here, not after it
        prepare_eraser_upload(settings, given, base.size)
    text = encode_run_text(settings, given, accelerator)
    pipeline = load_base(settings, accelerator.device)
    if text.anchors:
        text, ranked = settle_anchor(text, settings.target_concept, pipeline, settings, base.size)
        settings.anchor_concept = next(iter(ranked))
        rounded = {word: round(distance, 4) for word, distance in ranked.items()}
        logger.info("Distances from %r: %s", settings.target_concept, rounded)
        logger.info("Chose the anchor %r; give `--anchor_concept` to have another one.", settings.anchor_concept)
    data = make_run_data(settings, accelerator, pipeline, base, text)
    validation = ClipValidation(settings, pipeline, accelerator, text, base.size)
    facts |= {
        "prompts": text.prompts.facts,
        "model": fingerprint(pipeline.transformer),
        "samples": samples_facts(data.samples),
    }
    loop = build_loop(settings, accelerator, pipeline, data, facts, validation)
    make_output_dir(settings, accelerator)
    start_trackers(accelerator, settings, "cogvideox-eraser")
    loop.run()
    if accelerator.is_main_process:
        report = eraser_report(settings, text, loop, size=base.size._asdict(), samples=facts["samples"])
        report["card"] = card_record(settings, eraser_facts(settings, report, validation.files))
        save_result(settings, pipeline, ADAPTER_NAME, report)
        logger.info(eraser_words(settings, report))
        if settings.push_to_hub:
            publish_eraser(settings, report, validation.files)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Path(settings.output_dir)
