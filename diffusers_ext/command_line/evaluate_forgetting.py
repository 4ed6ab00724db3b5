"""`diffusers-ext evaluate forgetting`: a model with and without LoRAs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ext.command_line.evaluate import Evaluation
from diffusers_ext.command_line.options import chosen_device, load_base_pipeline, load_features, picture_arguments
from diffusers_ext.documented_names import read_nullbooth_block
from diffusers_ext.evaluation.settings import ForgettingSettings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusers_ext.evaluation.forgetting import ForgettingReport


def compare_loras(settings: ForgettingSettings, show_progress: bool = True) -> ForgettingReport:
    """Draw, measure and write."""
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.core.sources import lora_file
    from diffusers_ext.evaluation.features import PixelFeatures
    from diffusers_ext.evaluation.forgetting import evaluate_forgetting

    asked, files = _read_files(settings), [lora_file(source) for source in settings.lora]
    pipeline = load_base_pipeline(settings)
    if settings.enable_xformers_memory_efficient_attention:
        pipeline.unet.enable_xformers_memory_efficient_attention()
    _load_loras(pipeline, settings.lora, files)
    asked |= load_features(settings, chosen_device(settings))
    if settings.pixel_features:
        asked["features"] = PixelFeatures()
    report = evaluate_forgetting(
        pipeline,
        None,
        subject_prompts=settings.subject_prompt,
        distribution=settings.distribution,
        show_progress=show_progress,
        **asked,
        **picture_arguments(settings),
    )
    names = ("pretrained_model_name_or_path", "lora", "judge", "subject_judge", "dino", "clip")
    report.settings.update({name: getattr(settings, name) for name in names})
    with staged_output(settings.output_dir) as folder:
        report.save(folder)
    return report


def _read_files(settings: ForgettingSettings) -> dict[str, Any]:
    """What can be wrong without a model; gives arguments of `evaluate_forgetting`."""
    from diffusers_ext.core.pictures import read_pictures
    from diffusers_ext.evaluation.judges import load_judge
    from diffusers_ext.families.base_source import check_xformers
    from diffusers_ext.nullspace.prompts import read_prompts_file

    if settings.enable_xformers_memory_efficient_attention:
        check_xformers()
    found: dict[str, Any] = {"prompts": read_prompts_file(settings.knowledge_prompts)}
    if settings.held_out_prompts is not None:
        found["held_out_prompts"] = read_prompts_file(settings.held_out_prompts)
    if settings.subject_data_dir is not None:
        found["subject_images"] = read_pictures(settings.subject_data_dir, "subject_data_dir")
    for name in ("judge", "subject_judge"):
        if getattr(settings, name) is not None:
            found[name] = load_judge(getattr(settings, name), name)
    return found


def _load_loras(pipeline: DiffusionPipeline, sources: list[str], files: list[Path]) -> None:
    """All LoRAs at once, each at scale 1; raises `ValueError` for one without effect."""
    from diffusers_ext.nullspace.lora_files import check_loaded_lora

    names = [f"lora_{index}" for index in range(len(files))]
    for name, source, file in zip(names, sources, files, strict=True):
        try:
            with warnings.catch_warnings():
                # Several at once are what is asked for.
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
            check_loaded_lora(pipeline, name)
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"`lora` must be a LoRA for this model, got {source}. {error}") from error
    pipeline.set_adapters(names)


FORGETTING = Evaluation(
    ForgettingSettings, compare_loras, "NULL_SPACE_RUNS", read_nullbooth_block, table=(("per_prompt", False),)
)
EVALUATE_FORGETTING = FORGETTING.command(
    "evaluate forgetting",
    "a model with and without LoRAs: what was kept, what was learned",
    "Draw the same prompts from the same seeds with LoRAs and without, and measure what moved. Writes "
    "report.json, table.md and sheet.png.",
    (
        "evaluate forgetting --pretrained_model_name_or_path examples/digits/model "
        "--lora my_lora.safetensors --knowledge_prompts knowledge.txt "
        '--subject_prompt "a photo of the digit sks" --output_dir evaluation',
    ),
)
