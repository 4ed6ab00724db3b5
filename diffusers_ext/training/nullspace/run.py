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
from diffusers_ext.training.run.arguments import NULL_SPACE_GROUPS
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
        NullSpaceSettings, __doc__, input_args, read_nullbooth_block, NULL_SPACE_GROUPS
    )


def check_args(args: NullSpaceSettings) -> None:
    """Everything that can be wrong without loading a model."""
    check_adapter(args)
    check_knowledge(args)
    check_pictures(args)
    check_resume(args, run_facts(args, **subject_settings(args)))


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build_loop(
    args: NullSpaceSettings,
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    statistics: FeatureStatistics | None,
    validation: Validation,
) -> TrainingLoop:
    """The loop over a UNet that `prepare_weights` has made trainable."""
    images = list_images(args.instance_data_dir)
    crop = not args.no_center_crop
    dataset = encode_images(
        pipeline, images, args.resolution, center_crop=crop, flip=args.random_flip
    )
    if captions := caption_facts(args):
        dataset = with_prompts(dataset, picture_prompts(args), subject_prompts(args))
    loss_function = make_loss(args, pipeline, accelerator, statistics)
    prior = args.with_prior_preservation
    facts = run_facts(
        args,
        model=fingerprint(pipeline.unet),
        pictures=hash_files(images),
        class_pictures=hash_files(list_images(args.class_data_dir)) if prior else None,
        knowledge=None if statistics is None else statistics.facts,
        num_processes=accelerator.num_processes,
        **captions,
        **subject_settings(args),
    )
    check_resume(args, facts)
    trained = [p for p in pipeline.unet.parameters() if p.requires_grad]
    optimizer = make_optimizer(args, trained, accelerator)
    return TrainingLoop(
        accelerator,
        pipeline.unet,
        optimizer,
        dataset,
        loss_function,
        loop_settings(args, f"{args.directions} training"),
        make_schedule(args, optimizer),
        checkpoints=Checkpoints(
            accelerator,
            args.output_dir,
            facts,
            args.checkpointing_steps,
            args.checkpoints_total_limit,
            keep_rule(args),
        ),
        resume_from_checkpoint=args.resume_from_checkpoint,
        callbacks=validation.callbacks(),
    )


@one_run_a_folder
def main(args: NullSpaceSettings) -> Path:
    """Train and save; returns the output folder."""
    check_args(args)
    accelerator = make_accelerator(args)
    found = find_pictures(args.instance_data_dir, "instance_data_dir")
    logger.info(found.summary())
    tell_of_captions(args)
    if args.push_to_hub and accelerator.is_main_process:
        check_login(args)  # a missing login stops the run here, not after it
    pipeline = load_pipeline(args, accelerator.device, WEIGHT_DTYPES[args.mixed_precision])
    check_against_model(args, pipeline)
    if args.push_to_hub and accelerator.is_main_process:
        prepare_upload(args, subject_card(args, pipeline))
    plain = args.directions == "plain"
    statistics = None if plain else load_or_collect(args, pipeline, accelerator)
    warn_of_missing_words(args, read_knowledge(args) if plain else statistics.facts["prompts"])
    prepared = prepare_weights(args, pipeline, statistics)
    if prepared.report:
        logger.info(directions_words(prepared.report))
    validation = Validation(args, pipeline, accelerator)
    loop = build_loop(args, accelerator, pipeline, statistics, validation)
    make_output_dir(args, accelerator)
    start_trackers(accelerator, args, "nullspace-dreambooth")
    constrained = bool(prepared.projections)
    with ProjectedUpdate(loop.optimizer, prepared.projections) if constrained else nullcontext():
        pipeline.unet = loop.run()
    pipeline.unet.eval()
    if accelerator.is_main_process:
        report = {
            "arguments": reported_arguments(args),
            "directions": prepared.report,
            "statistics": [] if statistics is None else statistics.report(),
            "history": loop.history,
            "seconds": loop.seconds,
            "card": card_record(args, subject_facts(args, pipeline, statistics, validation.files)),
        }
        save_result(args, pipeline, statistics, report)
        count = len(list_images(args.instance_data_dir))
        logger.info(subject_words(args, report, count))
        if not args.full_finetune:
            logger.info(files_for_programs(args))
        if args.push_to_hub:
            publish(args, pipeline, statistics, report, validation.files)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Path(args.output_dir)


if __name__ == "__main__":
    run_script(parse_args, main, NullSpaceSettings)
