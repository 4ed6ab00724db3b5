"""Train an eraser that takes one concept out of a model of videos or pictures and leaves the rest, from prompts alone.

    accelerate launch training/train_eraser.py \\
        --pretrained_model_name_or_path examples/moving_digits/model \\
        --target_concept seven --anchor_concept auto --prompts_file prompts.txt \\
        --preserved_concepts_file digits.txt --eraser_rank 32 --learning_rate 5e-3 \\
        --train_batch_size 16 --max_train_steps 400 --output_dir outputs/eraser
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.outputs import trainable_eraser_parameters
from diffusers_ext.eraser.attack import AdversarialPrompts
from diffusers_ext.eraser.batch import RowMaker
from diffusers_ext.eraser.recipe import EraserSettings, EraserTraining
from diffusers_ext.eraser.step import EraserStep, OnPolicyRollouts
from diffusers_ext.eraser.text_codebook import attach_text_codebook, codebook_of_recipe
from diffusers_ext.families import find_family
from diffusers_ext.families.text_conditioning import token_embeds
from diffusers_ext.training.eraser.base import BaseFacts, load_base, read_base, read_first_frames, settings_of_part
from diffusers_ext.training.eraser.data import (
    ClipSize,
    EraserData,
    FirstFrames,
    concept_tokens,
    make_samples,
    samples_facts,
)
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
from diffusers_ext.training.run.loop import LoopSettings, TrainingLoop
from diffusers_ext.training.run.script import (
    card_record,
    check_login,
    check_output_dir,
    eraser_words,
    one_run_a_folder,
)
from diffusers_ext.training.run.settings import parse_settings
from diffusers_ext.training.run.setup import (
    ERASER_RUNS,
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


def add_eraser(
    transformer: torch.nn.Module,
    recipe: EraserTraining,
    adapter_name: str = "default",
    *,
    concept: str | None = None,
    anchor_concept: str | None = None,
) -> list[torch.nn.Parameter]:
    """Put a new eraser into a transformer; returns its parameters, the only ones that train."""
    config = EraserConfig(r=recipe.rank, kind=recipe.kind, concept=concept, anchor_concept=anchor_concept)
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
    conditions = {"guidance_scale": recipe.sampling_guidance_scale, "image_latents": data.image_latents}
    shape, velocity = data.size.latent_shape(pipeline), data.size.velocity(pipeline, data.expert, **conditions)
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
        rollouts = OnPolicyRollouts(pipeline, data.text, recipe, shape, data.size._asdict(), data.expert, velocity)
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
    expert: str | None = None,
    first_frames: FirstFrames | None = None,
    **options: Any,
) -> EraserData:
    """Text and samples of a training, of one of a model's transformers; `options` are those of `make_samples`."""
    text = encode_text(pipeline, prompts)
    token_mask = concept_tokens(pipeline, prompts.target, recipe, concept)
    image = None if first_frames is None else first_frames.latents
    samples = make_samples(pipeline, text, token_mask, recipe, size, expert=expert, image_latents=image, **options)
    return EraserData(text, token_mask, samples, size, expert, first_frames)


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
    expert: str | None = None,
    **options: Any,
) -> TrainedEraser:
    """Train an eraser; it stays in the pipeline's denoiser, in eval mode and switched on.

    Of a model with several transformers (Wan 2.2), a call trains the part of one, which `expert` names: that for the
    timesteps at which this one is asked.

    Args:
        size: of the clips; the model's own when `None`.
        concept, anchor_concept: for the adapter's config and for masks.
        data: of an earlier call with the same prompts, size and sampling, to be used again.
        accelerator: on the pipeline's device, in full precision, when `None`.
        options: of `make_data`: `first_frames` of an image-to-video model, and those of `make_samples`.
    """
    experts = find_family(pipeline, "eraser").expert_timesteps(pipeline)
    expert = data.expert if data is not None and expert is None else expert
    if len(experts) > 1 and expert not in experts:
        raise ValueError(
            f"`expert` must be one of {sorted(experts)} for this model, got {expert}. Train each of them."
        )
    name = expert or next(iter(experts))
    transformer = getattr(pipeline, name)
    if data is None:
        size = ClipSize.of_pipeline(pipeline) if size is None else size
        data = make_data(pipeline, prompts, recipe, size, concept=concept, expert=expert, **options)
    if accelerator is None:
        accelerator = Accelerator(
            cpu=transformer.device.type == "cpu", gradient_accumulation_steps=recipe.gradient_accumulation_steps
        )
    codebook = codebook_of_recipe(pipeline, prompts.target, prompts.anchor, data.text, recipe)
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
        _take_back(pipeline, name, accelerator, loop)
    if codebook is not None:
        attach_text_codebook(getattr(pipeline, name), adapter_name, codebook)
    return TrainedEraser(loop.history, loop.seconds, data)


def _take_back(pipeline: DiffusionPipeline, name: str, accelerator: Accelerator, loop: TrainingLoop) -> None:
    """Put a trained transformer back as it was before accelerate, frozen and in eval mode."""
    trained = accelerator.unwrap_model(loop.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    setattr(pipeline, name, trained.requires_grad_(False).eval())


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
    settings: EraserSettings,
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    base: BaseFacts,
    text: RunText,
    expert: str | None = None,
    first_frames: FirstFrames | None = None,
) -> EraserData:
    """The samples of the run, made or read again."""
    image = None if first_frames is None else first_frames.latents
    collection: dict[str, Any] = {"expert": expert, "image_latents": image}
    token_mask = concept_tokens(pipeline, text.prompts.target, settings, settings.target_concept)
    if settings.latents_source == "video":
        pipeline.vae.to(accelerator.device)
        collection["video_dir"] = settings.video_dir
    elif settings.latents_source == "trajectory":
        collection["storage_dtype"] = _DTYPES[settings.trajectories_dtype]
    if settings.trajectories_dir is not None:
        collection |= {
            "directory": settings.trajectories_dir,
            "facts": {
                "prompts": text.prompts.facts,
                "text_dtype": str(token_embeds(text.embeds.target).dtype),
                **({} if image is None else {"first_frames": image.double().sum().item()}),
            },
            "process": (accelerator.process_index, accelerator.num_processes),
            "wait_for_everyone": accelerator.wait_for_everyone,
        }
    with accelerator.autocast():  # as the student runs, or the two would differ before any training
        samples = make_samples(pipeline, text.embeds, token_mask, settings, base.size, **collection)
    pipeline.vae.to("cpu")
    return EraserData(text.embeds, token_mask, samples, base.size, expert, first_frames)


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
    transformer = getattr(pipeline, data.expert or find_family(pipeline, "eraser").denoiser)
    parameters = add_eraser(transformer, settings, ADAPTER_NAME, **concepts)
    step = make_step(pipeline, data, settings, accelerator.device, ADAPTER_NAME)
    return make_loop(
        settings,
        accelerator,
        transformer,
        data.samples,
        step,
        facts,
        "eraser training",
        parameters=parameters,
        validate=validation.draw if settings.validation_prompt else None,
        parts=step.stateful,
    )


def train_part(
    settings: EraserSettings,
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    base: BaseFacts,
    text: RunText,
    facts: dict[str, Any],
    validation: ClipValidation,
    expert: str,
) -> tuple[TrainingLoop, dict[str, Any]]:
    """Train one transformer's part; returns its loop and what tells its samples."""
    several, whole = len(base.experts) > 1, settings
    settings = settings_of_part(settings, base.experts, expert)
    for name in base.experts:
        getattr(pipeline, name).to(accelerator.device)
    shown = validation.first_frames
    data = make_run_data(settings, accelerator, pipeline, base, text, expert if several else None, shown)
    if not (settings.on_policy_share or settings.validation_prompt):  # which draw with all of them
        for name in set(base.experts) - {expert}:
            getattr(pipeline, name).to("cpu")
    facts = facts | {"model": fingerprint(getattr(pipeline, expert)), "samples": samples_facts(data.samples)}
    if several:
        facts["transformer"], validation.part = expert, f"-{expert}"
    codebook = codebook_of_recipe(pipeline, text.prompts.target, text.prompts.anchor, data.text, settings)
    loop = build_loop(settings, accelerator, pipeline, data, facts, validation)
    make_output_dir(settings, accelerator)
    if expert == base.experts[0]:
        make_output_dir(whole, accelerator)
        start_trackers(accelerator, whole, f"{find_family(pipeline, 'eraser').name}-eraser")
    loop.run()
    if several:
        if settings.checkpointing_steps and settings.max_train_steps % settings.checkpointing_steps:
            loop.checkpoints.save(settings.max_train_steps)  # so that a later resume finds this part done
        _take_back(pipeline, expert, accelerator, loop)
        accelerator.free_memory()
        loop.dataset = ()  # as large as the models
    if codebook is not None:
        attach_text_codebook(getattr(pipeline, expert), ADAPTER_NAME, codebook)
    return loop, facts["samples"]


@one_run_a_folder
def main(settings: EraserSettings) -> Path:
    """Train and save; returns the output folder."""
    settings.check_preserved()
    accelerator = make_accelerator(settings)
    base, given = read_base(settings), read_texts(settings)
    facts = resume_facts(settings, given, base)
    check_output_dir(settings)
    for expert in base.experts:
        check_resume(settings_of_part(settings, base.experts, expert), facts)
    if settings.push_to_hub and accelerator.is_main_process:
        check_login(settings)  # a missing login or licence stops the run here, not after it
        prepare_eraser_upload(settings, given, base.size)
    text = encode_run_text(settings, given, accelerator)
    pipeline = load_base(settings, accelerator.device)
    first_frames = read_first_frames(settings, pipeline, base.size)
    if text.anchors:
        image = None if first_frames is None else first_frames.latents
        text, ranked = settle_anchor(text, settings.target_concept, pipeline, settings, base.size, image)
        settings.anchor_concept = next(iter(ranked))
        rounded = {word: round(distance, 4) for word, distance in ranked.items()}
        logger.info("Distances from %r: %s", settings.target_concept, rounded)
        logger.info("Chose the anchor %r; give `--anchor_concept` to have another one.", settings.anchor_concept)
    validation = ClipValidation(settings, pipeline, accelerator, text, base.size, first_frames)
    facts["prompts"] = text.prompts.facts
    loops, samples = {}, {}
    for expert in base.experts:
        known = (settings, accelerator, pipeline, base, text, facts, validation)
        loops[expert], samples[expert] = train_part(*known, expert)
    if accelerator.is_main_process:
        found = samples if len(samples) > 1 else next(iter(samples.values()))
        report = eraser_report(settings, text, loops, size=base.size._asdict(), samples=found)
        report["card"] = card_record(settings, eraser_facts(settings, report, validation.files))
        save_result(settings, pipeline, ADAPTER_NAME, report)
        logger.info(eraser_words(settings, report))
        if settings.push_to_hub:
            publish_eraser(settings, report, validation.files)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Path(settings.output_dir)
