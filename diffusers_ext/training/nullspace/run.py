"""Teach a text-to-image model a new subject without forgetting what it knows.

    accelerate launch training/train_nullspace_dreambooth.py \\
        --pretrained_model_name_or_path examples/digits/model \\
        --instance_data_dir pictures --instance_prompt "a photo of sks" \\
        --knowledge_prompts knowledge.txt --resolution 32 --output_dir outputs/subject
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from diffusers.training_utils import free_memory
from diffusers.utils import make_image_grid
from peft import LoraConfig

from diffusers_ext.core.artifacts import CONFIG_NAME, fingerprint
from diffusers_ext.core.pictures import find_pictures, read_picture
from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.seeds import check_min_snr
from diffusers_ext.documented_names import read_nullbooth_block
from diffusers_ext.families import find_family, match_family
from diffusers_ext.nullspace.lora import check_lora_config
from diffusers_ext.nullspace.projector import ProjectedUpdate
from diffusers_ext.nullspace.prompts import check_prompt_length
from diffusers_ext.nullspace.scope import check_no_features, settle_scope
from diffusers_ext.nullspace.settings import NullSpaceSettings
from diffusers_ext.nullspace.slots import find_linears
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.training.nullspace.data import (
    caption_facts,
    draw_images,
    list_images,
    own_resolution,
    own_sizes,
    sampling_arguments,
    subject_latents,
    subject_prompts,
    tell_of_captions,
    warn_of_missing_words,
)
from diffusers_ext.training.nullspace.knowledge import load_or_collect, load_pipeline, read_knowledge
from diffusers_ext.training.nullspace.subject import (
    directions_words,
    files_for_programs,
    keep_rule,
    make_loss,
    prepare_weights,
    publish,
    save_result,
    subject_card,
    subject_facts,
    subject_words,
    training_schedule_of,
)
from diffusers_ext.training.run.loop import TrainingLoop
from diffusers_ext.training.run.script import (
    card_record,
    check_login,
    one_run_a_folder,
    prepare_upload,
    reported_arguments,
)
from diffusers_ext.training.run.settings import parse_settings
from diffusers_ext.training.run.setup import (
    NULL_SPACE_RUNS,
    WEIGHT_DTYPES,
    check_resume,
    make_accelerator,
    make_loop,
    make_output_dir,
    run_facts,
    start_trackers,
)

logger = get_logger(__name__)


def check_knowledge(settings: NullSpaceSettings) -> None:
    """Raise `ValueError` where the directions need statistics and there is nothing to preserve."""
    if settings.directions == "plain":
        return
    if settings.statistics is None:
        if not read_knowledge(settings):
            raise ValueError("`--statistics` or `--knowledge_prompts` must be given: what should be preserved?")
    elif Path(settings.statistics).is_dir() and not Path(settings.statistics, CONFIG_NAME).is_file():
        raise ValueError(
            f"`statistics` must be a folder with {CONFIG_NAME}, got {settings.statistics} without it. "
            "training/build_covariance.py writes one."
        )


def check_against_model(settings: NullSpaceSettings, pipeline: DiffusionPipeline) -> None:
    """Raise `ValueError` for arguments that do not fit the loaded model; settles what it decides."""
    settle_resolution(settings, pipeline)
    if settings.aspect_buckets:
        own_sizes(settings, pipeline)
    scope, family = settle_scope(denoiser_of(pipeline), settings.scope), find_family(pipeline, "nullspace")
    settings.settle_rate(joint=scope is not None)
    settings.settle_guidance(family.usual_guidance(type(pipeline), denoiser_of(pipeline).config))
    check_schedule(settings, pipeline)
    fault = find_family(pipeline, "nullspace").checkpointing_fault
    if settings.gradient_checkpointing and fault:
        logger.warning(
            f"--gradient_checkpointing of a {type(denoiser_of(pipeline)).__name__} {fault} in diffusers: it trains on "
            "other predictions than it draws with. Train without where memory allows."
        )
    prompts = [*subject_prompts(settings), settings.negative_prompt, *settings.validation_prompt]
    if settings.with_prior_preservation:
        prompts.append(settings.class_prompt)
    if settings.directions != "plain":
        prompts += settings.other_instance_prompts
    if scope is not None:
        check_no_features(settings.features, settings.cross_attention_layers)
    elif settings.directions == "plain" or settings.statistics is None:
        find_linears(denoiser_of(pipeline), settings.features, settings.cross_attention_layers)
    if settings.directions != "plain" and settings.statistics is None:
        prompts += read_knowledge(settings)
    check_prompt_length(pipeline, prompts)


def check_schedule(settings: NullSpaceSettings, pipeline: DiffusionPipeline) -> None:
    """Raise `ValueError` for settings of a schedule that the model does not have."""
    family = find_family(pipeline, "nullspace")
    schedule, name = training_schedule_of(settings, pipeline), type(denoiser_of(pipeline)).__name__
    if not family.embedded_guidance(denoiser_of(pipeline).config) and settings.guidance_embedding is not None:
        raise ValueError(
            f"`guidance_embedding` must be left out for a {name} that takes no guidance scale, got "
            f"{settings.guidance_embedding}."
        )
    if family.flow_matching:
        if settings.snr_gamma is not None:
            raise ValueError(
                f"`snr_gamma` must be left out for the flow-matching {name}, got {settings.snr_gamma}: levels of "
                "noise are weighed by `--weighting_scheme`."
            )
        return
    if settings.weighting_scheme is not None:
        raise ValueError(
            f"`weighting_scheme` must be left out for {family.title}, which is no flow-matching model, got "
            f"{settings.weighting_scheme!r}."
        )
    check_min_snr(schedule, settings.snr_gamma)


def settle_resolution(settings: NullSpaceSettings, pipeline: DiffusionPipeline) -> None:
    """Make `--resolution` the model's own where it is not given; warn where it is another."""
    own = own_resolution(pipeline)
    if settings.resolution is None:
        if own is None:
            raise ValueError("`resolution` must be given for a model without a square size of its own, got None.")
        settings.resolution = own
    family = match_family(pipeline, "nullspace")
    if family is not None and family.flow_matching:
        multiple = family.pixels_per_latent(pipeline) * family.patch(denoiser_of(pipeline).config)
        if settings.resolution % multiple:
            raise ValueError(
                f"`resolution` must be a multiple of {multiple} for this model, got {settings.resolution}."
            )
    if own is not None and settings.resolution != own:
        logger.warning(
            f"--resolution is {settings.resolution}, the model's own is {own}: pictures of another size "
            "take another time to train on and may be drawn worse. Leave the flag out for the "
            "model's own."
        )


def subject_settings(settings: NullSpaceSettings) -> dict[str, Any]:
    """The arguments that, beside those of every training, decide what comes out."""
    names = (
        "instance_prompt", "resolution", "no_center_crop", "random_flip", "snr_gamma",
        "with_prior_preservation", "directions", "rank", "eps", "null_energy",
        "nullspace_threshold", "preservation_weight", "lora_dropout", "full_finetune",
        "gradient_checkpointing", "allow_tf32",
    )  # fmt: skip
    facts = {name: getattr(settings, name) for name in names}
    if settings.resolution is None:  # the model's own, which is not known before it is loaded
        del facts["resolution"]
    for name in (
        "weighting_scheme",
        "guidance_embedding",
        "scope",
        "quantization",
    ):  # left out where they are not given, as before they were
        if getattr(settings, name) is not None:
            facts[name] = getattr(settings, name)
    if settings.aspect_buckets:
        facts["aspect_buckets"] = True
    if settings.with_prior_preservation:
        facts.update(class_prompt=settings.class_prompt, prior_loss_weight=settings.prior_loss_weight)
    if settings.directions == "plain":
        layers = settings.cross_attention_layers
        facts.update(features=list(settings.features), cross_attention_layers=layers)
    return facts


class Validation:
    """Draws `--validation_prompt` at fixed seeds; `files` are the pictures of the last call."""

    def __init__(self, settings: NullSpaceSettings, pipeline: DiffusionPipeline, accelerator: Accelerator) -> None:
        self.settings, self.pipeline, self.accelerator = settings, pipeline, accelerator
        self.files: list[Path] = []
        self.texts: list[dict[str, torch.Tensor]] = []

    def free_encoders(self) -> None:
        """Encode the prompts now, and let the text encoders of the pipeline go."""
        settings, pipeline = self.settings, self.pipeline
        family, count = find_family(pipeline, "nullspace"), settings.num_validation_images
        negatives = [settings.negative_prompt] if settings.negative_prompt else None
        with torch.no_grad():
            for prompt in settings.validation_prompt:
                self.texts.append(family.text_arguments(family.encode(pipeline, [prompt], negatives).expand(count)))
        for name in [name for name in pipeline.components if name.startswith("text_encoder")]:
            setattr(pipeline, name, None)
        free_memory()

    def draw(self, step: int) -> None:
        """Draw and save the pictures of one step; the model's mode comes back afterwards."""
        if not self.accelerator.is_main_process:
            return
        settings, count = self.settings, self.settings.num_validation_images
        folder = Path(settings.output_dir, "validation")
        folder.mkdir(parents=True, exist_ok=True)
        seeds = range(settings.seed, settings.seed + count)
        self.files = []
        for index, prompt in enumerate(settings.validation_prompt):
            run = sampling_arguments(settings)
            if self.texts:
                run |= {"negative_prompt": None, **self.texts[index]}
            prompts = None if self.texts else [prompt] * count
            images = draw_images(self.pipeline, prompts, seeds, settings.resolution, **run)
            self.files.append(folder / f"step-{step:06d}-prompt-{index}.png")
            make_image_grid(images, rows=1, cols=count).save(self.files[-1])
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    stacked = np.stack([np.asarray(image) for image in images])
                    tracker.writer.add_images(prompt, stacked, step, dataformats="NHWC")


def parse_args(input_args: Sequence[str] | None = None) -> NullSpaceSettings:
    """Command line of this script, over the YAML file of `--config`."""
    return parse_settings(NullSpaceSettings, __doc__, input_args, read_nullbooth_block, NULL_SPACE_RUNS)


def check_args(settings: NullSpaceSettings) -> None:
    """Everything that can be wrong without loading a model."""
    check_lora_config(LoraConfig(use_dora=settings.use_dora, bias=settings.lora_bias))
    check_knowledge(settings)
    for path in list_images(settings.instance_data_dir):
        read_picture(path)
    subject_prompts(settings)  # broken captions stop here
    facts = run_facts(settings, **subject_settings(settings))
    if settings.rate_is_open:  # the model decides, which is not loaded
        for name in ("learning_rate", "lr_scheduler"):
            del facts[name]
    check_resume(settings, facts)


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build_loop(
    settings: NullSpaceSettings,
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    statistics: FeatureStatistics | None,
    validation: Validation,
) -> TrainingLoop:
    """The loop over a denoiser that `prepare_weights` has made trainable."""
    denoiser, images = denoiser_of(pipeline), list_images(settings.instance_data_dir)
    dataset, buckets = subject_latents(settings, pipeline)
    loss_function = make_loss(settings, pipeline, accelerator, statistics)
    prior = settings.with_prior_preservation
    facts = run_facts(
        settings,
        model=fingerprint(denoiser),
        pictures=_hash_files(images),
        class_pictures=_hash_files(list_images(settings.class_data_dir)) if prior else None,
        knowledge=None if statistics is None else statistics.facts,
        **caption_facts(settings),
        **subject_settings(settings),
    )
    return make_loop(
        settings,
        accelerator,
        denoiser,
        dataset,
        loss_function,
        facts,
        f"{settings.directions} training",
        validate=validation.draw if settings.validation_prompt else None,
        keep=keep_rule(settings),
        buckets=buckets,
    )


@one_run_a_folder
def main(settings: NullSpaceSettings) -> Path:
    """Train and save; returns the output folder."""
    check_args(settings)
    accelerator = make_accelerator(settings)
    found = find_pictures(settings.instance_data_dir, "instance_data_dir")
    logger.info(found.summary())
    tell_of_captions(settings)
    if settings.push_to_hub and accelerator.is_main_process:
        check_login(settings)  # a missing login stops the run here, not after it
    pipeline = load_pipeline(settings, accelerator.device, WEIGHT_DTYPES[settings.mixed_precision])
    check_against_model(settings, pipeline)
    if settings.push_to_hub and accelerator.is_main_process:
        prepare_upload(settings, subject_card(settings, pipeline))
    plain = settings.directions == "plain"
    statistics = None if plain else load_or_collect(settings, pipeline, accelerator)
    warn_of_missing_words(settings, read_knowledge(settings) if plain else statistics.facts["prompts"])
    prepared = prepare_weights(settings, pipeline, statistics)
    if prepared.report:
        logger.info(directions_words(prepared.report))
    validation = Validation(settings, pipeline, accelerator)
    loop = build_loop(settings, accelerator, pipeline, statistics, validation)
    family = find_family(pipeline, "nullspace")
    if family.flow_matching and not settings.full_finetune:
        validation.free_encoders()  # which are larger than what they encode for, and are done
    make_output_dir(settings, accelerator)
    start_trackers(accelerator, settings, "nullspace-dreambooth")
    constrained = bool(prepared.projections)
    with ProjectedUpdate(loop.optimizer, prepared.projections) if constrained else nullcontext():
        trained = loop.run()
    setattr(pipeline, family.denoiser, trained.eval())
    if accelerator.is_main_process:
        report = {
            "arguments": reported_arguments(settings),
            "directions": prepared.report,
            "statistics": [] if statistics is None else statistics.report(),
            "history": loop.history,
            "seconds": loop.seconds,
            "card": card_record(settings, subject_facts(settings, pipeline, statistics, validation.files)),
        }
        save_result(settings, pipeline, statistics, report)
        count = len(list_images(settings.instance_data_dir))
        logger.info(subject_words(settings, report, count))
        if not settings.full_finetune:
            logger.info(files_for_programs(settings))
        if settings.push_to_hub:
            publish(settings, pipeline, statistics, report, validation.files)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Path(settings.output_dir)
