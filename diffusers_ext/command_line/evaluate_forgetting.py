"""`diffusers-ext evaluate forgetting`: a model with and without LoRAs."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ext.command_line.options import (
    COUNTS,
    Command,
    Outcome,
    add_base_model_arguments,
    add_feature_arguments,
    add_picture_arguments,
    check_drawing_arguments,
    chosen_device,
    load_base_pipeline,
    load_features,
    picture_arguments,
    report_outcome,
)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusers_ext.evaluation.forgetting_report import ForgettingReport


def add_forgetting_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared on which prompts."""
    add_base_model_arguments(parser)
    parser.add_argument("--output_dir", required=True, help="folder of the report")
    parser.add_argument(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="xFormers in place of PyTorch's own memory-efficient attention",
    )
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--lora", action="append", required=True, help="file, folder or Hub name; may be repeated"
    )
    group.add_argument("--knowledge_prompts", required=True, help="text file, one prompt a line")
    group.add_argument("--held_out_prompts", help="text file of knowledge not in the statistics")
    group.add_argument("--subject_prompt", action="append", default=[], help="may be repeated")
    group.add_argument("--subject_data_dir", help="pictures of the real subject, for similarity")
    group.add_argument(
        "--judge", help="module:attribute, imported; whether a picture shows its prompt"
    )
    group.add_argument("--subject_judge", help="the same for the subject prompts")
    add_feature_arguments(group, "features")
    group.add_argument("--pixel_features", action="store_true", help="pixels as features")
    group.add_argument("--distribution", action="store_true", help="also compare distributions")
    add_picture_arguments(parser)


def compare_loras(args: argparse.Namespace) -> ForgettingReport:
    """Draw, measure and write."""
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.core.sources import lora_file
    from diffusers_ext.evaluation.features import PixelFeatures
    from diffusers_ext.evaluation.forgetting import evaluate_forgetting

    asked, files = _check(args), [lora_file(source) for source in args.lora]
    pipeline = load_base_pipeline(args)
    if args.enable_xformers_memory_efficient_attention:
        pipeline.unet.enable_xformers_memory_efficient_attention()
    _load_loras(pipeline, args.lora, files)
    asked |= load_features(args, chosen_device(args))
    if args.pixel_features:
        asked["features"] = PixelFeatures()
    report = evaluate_forgetting(
        pipeline,
        None,
        subject_prompts=args.subject_prompt,
        distribution=args.distribution,
        **asked,
        **picture_arguments(args),
    )
    names = ("pretrained_model_name_or_path", "lora", "judge", "subject_judge", "dino", "clip")
    report.settings.update({name: getattr(args, name) for name in names})
    with staged_output(args.output_dir) as folder:
        report.save(folder)
    return report


def run_forgetting(args: argparse.Namespace) -> Outcome:
    """Compare, and say what was found without one row for every prompt."""
    report = compare_loras(args)
    return report_outcome(report, Path(args.output_dir), report.to_table(per_prompt=False))


def _check(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that can be wrong without a model; gives arguments of `evaluate_forgetting`."""
    from diffusers_ext.core.pictures import read_pictures
    from diffusers_ext.evaluation.plugins import load_judge
    from diffusers_ext.families.base_source import check_xformers
    from diffusers_ext.nullspace.prompts import read_prompts_file

    check_drawing_arguments(args, COUNTS)
    if args.enable_xformers_memory_efficient_attention:
        check_xformers()
    if args.pixel_features and args.dino:
        raise ValueError("`pixel_features` must not be given together with `dino`.")
    has_features = args.dino or args.clip or args.pixel_features
    for name in ("distribution", "subject_data_dir"):
        if getattr(args, name) and not has_features:
            raise ValueError(
                f"`{name}` must have features to compare: pass `--dino`, `--clip` or "
                "`--pixel_features`."
            )
    found: dict[str, Any] = {"prompts": read_prompts_file(args.knowledge_prompts)}
    if args.held_out_prompts is not None:
        found["held_out_prompts"] = read_prompts_file(args.held_out_prompts)
    if args.subject_data_dir is not None:
        found["subject_images"] = read_pictures(args.subject_data_dir, "subject_data_dir")
    for name in ("judge", "subject_judge"):
        if getattr(args, name) is not None:
            found[name] = load_judge(getattr(args, name), name)
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
            raise ValueError(
                f"`lora` must be a LoRA for this model, got {source}. {error}"
            ) from error
    pipeline.set_adapters(names)


EVALUATE_FORGETTING = Command(
    "evaluate forgetting",
    "a model with and without LoRAs: what was kept, what was learned",
    "Draw the same prompts from the same seeds with LoRAs and without, and measure what moved. Writes "
    "report.json, table.md and sheet.png.",
    (
        "evaluate forgetting --pretrained_model_name_or_path examples/digits/model "
        "--lora my_lora.safetensors --knowledge_prompts knowledge.txt "
        '--subject_prompt "a photo of the digit sks" --output_dir evaluation',
    ),
    add_forgetting_arguments,
    run_forgetting,
    output="output_dir",
    result_names=("report.json",),
)
