"""Teach a Stable Diffusion or SDXL model a new subject without forgetting what it knows.

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

from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.core.pictures import find_pictures
from diffusers_ext.nullspace.projector import ProjectedUpdate
from diffusers_ext.nullspace.settings import NullSpaceSettings
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.training.nullspace.captions import (
    caption_facts,
    picture_prompts,
    subject_prompts,
    tell_of_captions,
    warn_of_missing_words,
)
from diffusers_ext.training.nullspace.checks import (
    Validation,
    check_adapter,
    check_against_model,
    check_knowledge,
    check_pictures,
    subject_settings,
)
from diffusers_ext.training.nullspace.pictures import encode_images, list_images, with_prompts
from diffusers_ext.training.nullspace.subject import (
    files_for_programs,
    keep_rule,
    make_loss,
    prepare_weights,
    save_result,
)
from diffusers_ext.training.run.checkpoints import Checkpoints
from diffusers_ext.training.run.closing_words import directions_words, subject_words
from diffusers_ext.training.run.config_file import read_nullbooth_block
from diffusers_ext.training.run.knowledge import load_or_collect, load_pipeline, read_knowledge
from diffusers_ext.training.run.loop import TrainingLoop
from diffusers_ext.training.run.script import one_run_a_folder, run_script
from diffusers_ext.training.run.settings import parse_settings
from diffusers_ext.training.run.setup import (
    WEIGHT_DTYPES,
    check_resume,
    loop_settings,
    make_accelerator,
    make_optimizer,
    make_output_dir,
    make_schedule,
    run_facts,
    start_trackers,
)
from diffusers_ext.training.run.shared_file import NULL_SPACE_RUNS
from diffusers_ext.training.run.upload import (
    card_record,
    check_login,
    prepare_upload,
    publish,
    reported_arguments,
    subject_card,
    subject_facts,
)


logger = get_logger(__name__)


def parse_args(input_args: Sequence[str] | None = None) -> NullSpaceSettings:
    """Command line of this script, over the YAML file of `--config`."""
    return parse_settings(
        NullSpaceSettings, __doc__, input_args, read_nullbooth_block, NULL_SPACE_RUNS
    )


def check_args(settings: NullSpaceSettings) -> None:
    """Everything that can be wrong without loading a model."""
    check_adapter(settings)
    check_knowledge(settings)
    check_pictures(settings)
    check_resume(settings, run_facts(settings, **subject_settings(settings)))


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents of files, in order."""
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
    """The loop over a UNet that `prepare_weights` has made trainable."""
    images = list_images(settings.instance_data_dir)
    crop = not settings.no_center_crop
    dataset = encode_images(
        pipeline, images, settings.resolution, center_crop=crop, flip=settings.random_flip
    )
    if captions := caption_facts(settings):
        dataset = with_prompts(dataset, picture_prompts(settings), subject_prompts(settings))
    loss_function = make_loss(settings, pipeline, accelerator, statistics)
    prior = settings.with_prior_preservation
    facts = run_facts(
        settings,
        model=fingerprint(pipeline.unet),
        pictures=hash_files(images),
        class_pictures=hash_files(list_images(settings.class_data_dir)) if prior else None,
        knowledge=None if statistics is None else statistics.facts,
        num_processes=accelerator.num_processes,
        **captions,
        **subject_settings(settings),
    )
    check_resume(settings, facts)
    trained = [p for p in pipeline.unet.parameters() if p.requires_grad]
    optimizer = make_optimizer(settings, trained, accelerator)
    return TrainingLoop(
        accelerator,
        pipeline.unet,
        optimizer,
        dataset,
        loss_function,
        loop_settings(settings, f"{settings.directions} training"),
        make_schedule(settings, optimizer),
        checkpoints=Checkpoints(
            accelerator,
            settings.output_dir,
            facts,
            settings.checkpointing_steps,
            settings.checkpoints_total_limit,
            keep_rule(settings),
        ),
        resume_from_checkpoint=settings.resume_from_checkpoint,
        callbacks=validation.callbacks(),
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
    warn_of_missing_words(
        settings, read_knowledge(settings) if plain else statistics.facts["prompts"]
    )
    prepared = prepare_weights(settings, pipeline, statistics)
    if prepared.report:
        logger.info(directions_words(prepared.report))
    validation = Validation(settings, pipeline, accelerator)
    loop = build_loop(settings, accelerator, pipeline, statistics, validation)
    make_output_dir(settings, accelerator)
    start_trackers(accelerator, settings, "nullspace-dreambooth")
    constrained = bool(prepared.projections)
    with ProjectedUpdate(loop.optimizer, prepared.projections) if constrained else nullcontext():
        pipeline.unet = loop.run()
    pipeline.unet.eval()
    if accelerator.is_main_process:
        report = {
            "arguments": reported_arguments(settings),
            "directions": prepared.report,
            "statistics": [] if statistics is None else statistics.report(),
            "history": loop.history,
            "seconds": loop.seconds,
            "card": card_record(
                settings, subject_facts(settings, pipeline, statistics, validation.files)
            ),
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


if __name__ == "__main__":
    run_script(parse_args, main, NullSpaceSettings)
