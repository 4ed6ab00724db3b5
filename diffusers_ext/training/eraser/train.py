"""Train an eraser that takes one concept out of CogVideoX and leaves the rest, from prompts alone.

    accelerate launch training/train_cogvideox_eraser.py \\
        --pretrained_model_name_or_path examples/moving_digits/model \\
        --target_concept seven --anchor_concept auto --prompts_file prompts.txt \\
        --preserved_concepts_file digits.txt --eraser_rank 32 --learning_rate 5e-3 \\
        --train_batch_size 16 --max_train_steps 400 --output_dir outputs/eraser
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.eraser.recipe import EraserSettings
from diffusers_ext.training.eraser.data import EraserData, concept_tokens, make_samples, samples_facts
from diffusers_ext.training.eraser.result import (
    ClipValidation,
    eraser_facts,
    eraser_report,
    prepare_eraser_upload,
    publish_eraser,
    save_result,
)
from diffusers_ext.training.eraser.run import BaseFacts, add_eraser, load_base, make_step, read_base
from diffusers_ext.training.eraser.text import GivenTexts, RunText, encode_run_text, read_texts, settle_anchor
from diffusers_ext.training.run.loop import TrainingLoop
from diffusers_ext.training.run.script import eraser_words, one_run_a_folder, run_script
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
from diffusers_ext.training.run.upload import card_record, check_login

logger = get_logger(__name__)

ADAPTER_NAME = "default"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def parse_args(input_args: Sequence[str] | None = None) -> EraserSettings:
    """Command line of this script, over the YAML file of `--config`."""
    return parse_settings(EraserSettings, __doc__, input_args, shared=ERASER_RUNS)


def resume_facts(settings: EraserSettings, given: GivenTexts, base: BaseFacts) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued and is known before weights are loaded."""
    recipe = settings.recipe()
    del recipe["max_train_steps"]
    names = ("target_concept", "anchor_concept", "max_preserved_prompts", "trajectories_dtype")
    return run_facts(
        settings,
        recipe=recipe,
        texts=asdict(given),
        size=list(base.size),
        **{name: getattr(settings, name) for name in names},
    )


def make_run_data(
    settings: EraserSettings, accelerator: Accelerator, pipeline: DiffusionPipeline, base: BaseFacts, text: RunText
) -> EraserData:
    """The samples of the run, made or read again."""
    collection: dict[str, Any] = {}
    token_mask = concept_tokens(pipeline, text.prompts, settings, settings.target_concept)
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
    facts = {**facts, "model": fingerprint(pipeline.transformer), "samples": samples_facts(data.samples)}
    parameters = add_eraser(
        pipeline.transformer,
        settings,
        ADAPTER_NAME,
        concept=settings.target_concept,
        anchor_concept=settings.anchor_concept,
    )
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
        text, settings.anchor_concept = settle_anchor(text, settings.target_concept, pipeline, settings, base.size)
    data = make_run_data(settings, accelerator, pipeline, base, text)
    validation = ClipValidation(settings, pipeline, accelerator, text, base.size)
    facts["prompts"] = text.prompts.facts
    loop = build_loop(settings, accelerator, pipeline, data, facts, validation)
    make_output_dir(settings, accelerator)
    start_trackers(accelerator, settings, "cogvideox-eraser")
    loop.run()
    if accelerator.is_main_process:
        report = eraser_report(settings, text, loop, size=base.size._asdict(), samples=samples_facts(data.samples))
        report["card"] = card_record(settings, eraser_facts(settings, report, validation.files))
        save_result(settings, pipeline, ADAPTER_NAME, report)
        logger.info(eraser_words(settings, report))
        if settings.push_to_hub:
            publish_eraser(settings, report, validation.files)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Path(settings.output_dir)


if __name__ == "__main__":
    run_script(parse_args, main, EraserSettings)
