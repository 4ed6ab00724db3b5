"""Compare a Stable Diffusion or SDXL model with and without LoRAs: what was kept, what was learned.

    python training/evaluate_nullspace.py \\
        --pretrained_model_name_or_path examples/digits/model --lora outputs/subject \\
        --knowledge_prompts knowledge.txt --held_out_prompts held_out.txt \\
        --subject_prompt "a photo of the digit sks" --output_dir outputs/evaluation \\
        --judge examples.digits.judge:DigitsJudge \\
        --subject_judge examples.digits.glyph_judge:GlyphJudge
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.command_line.argument_parser import OneLineParser
from diffusers_ext.core.checkpoint_folder import refuse_checkpoint
from diffusers_ext.core.pictures import read_pictures
from diffusers_ext.evaluation.features import CLIPFeatures, DINOv2Features, PixelFeatures
from diffusers_ext.evaluation.forgetting import evaluate_forgetting
from diffusers_ext.evaluation.forgetting_report import ForgettingReport
from diffusers_ext.nullspace.lora_files import LORA_WEIGHT_NAME, check_loaded_lora
from diffusers_ext.nullspace.prompts import read_prompts_file
from training.argument_rules import check_values
from training.arguments import (
    NULL_SPACE_GROUPS,
    add_attention_argument,
    add_evaluation_arguments,
    add_model_arguments,
    add_sampling_arguments,
)
from training.config_file import parse_arguments, read_nullbooth_block
from training.knowledge import decode_in_pipeline_dtype, load_pipeline
from training.output_folder import check_output_dir, one_run_a_folder, staged_output
from training.plugins import load_judge
from training.run_setup import WEIGHT_DTYPES, make_accelerator
from training.script_entry import run_script


logger = get_logger(__name__)


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this script, over the YAML file of `--config`."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for add_arguments in (
        add_model_arguments,
        add_attention_argument,
        add_sampling_arguments,
        add_evaluation_arguments,
    ):
        add_arguments(parser)
    required = ("pretrained_model_name_or_path", "lora", "knowledge_prompts", "output_dir")
    return parse_arguments(parser, input_args, required, read_nullbooth_block, NULL_SPACE_GROUPS)


def check_args(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that can be wrong without a model; returns arguments of `evaluate_forgetting`."""
    check_values(args, ["output_dir"], "a folder", lambda value: not Path(value).is_file())
    check_output_dir(args)
    counts = ("num_inference_steps", "num_images_per_prompt", "batch_size")
    check_values(args, counts, "at least 1", lambda value: value >= 1)
    check_values(args, ["sheet_prompts"], "at least 0", lambda value: value >= 0)
    check_values(args, ["seed"], "from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
    if args.pixel_features and args.dino:
        raise ValueError("`pixel_features` must not be given together with `dino`.")
    has_features = args.dino or args.clip or args.pixel_features
    for name in ("distribution", "subject_data_dir"):
        if getattr(args, name) and not has_features:
            raise ValueError(
                f"`{name}` must have features to compare: pass `--dino`, `--clip` or "
                "`--pixel_features`."
            )
    for lora in args.lora:
        find_lora(lora)
    found: dict[str, Any] = {"prompts": read_prompts_file(args.knowledge_prompts)}
    if args.held_out_prompts is not None:
        found["held_out_prompts"] = read_prompts_file(args.held_out_prompts)
    if args.subject_data_dir is not None:
        found["subject_images"] = read_pictures(args.subject_data_dir, "subject_data_dir")
    for name in ("judge", "subject_judge"):
        if getattr(args, name) is not None:
            found[name] = load_judge(getattr(args, name), name)
    return found


def find_lora(source: str) -> Path:
    """The weight file of a `--lora`; raises `ValueError` where there is none."""
    refuse_checkpoint(source)
    path = Path(source, LORA_WEIGHT_NAME) if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise ValueError(
            f"`lora` must be a folder with {LORA_WEIGHT_NAME} or a file, got {source}."
        )
    return path


def load_loras(pipeline: DiffusionPipeline, sources: Sequence[str]) -> None:
    """Load all LoRAs at once, each at scale 1; raises `ValueError` for one without effect."""
    names = [f"lora_{index}" for index in range(len(sources))]
    for name, source in zip(names, sources, strict=True):
        path = find_lora(source)
        try:
            with warnings.catch_warnings():
                # Several at once are what is asked for.
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
            check_loaded_lora(pipeline, name)
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(
                f"`lora` must be a LoRA for this model, got {source}. {error}"
            ) from error
    pipeline.set_adapters(names)


def make_features(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The `features` and the `scorer` of `--dino`, `--clip` and `--pixel_features`."""
    found: dict[str, Any] = {}
    if args.clip is not None:
        found["features"] = CLIPFeatures.from_pretrained(args.clip, device=device)
        found["scorer"] = found["features"].text_similarity
    if args.dino is not None:
        found["features"] = DINOv2Features.from_pretrained(args.dino, device=device)
    if args.pixel_features:
        found["features"] = PixelFeatures()
    return found


def write_report(args: argparse.Namespace, report: ForgettingReport) -> None:
    """Write `report.json`, `table.md` and `sheet.png`."""
    names = ("pretrained_model_name_or_path", "lora", "judge", "subject_judge", "dino", "clip")
    report.settings.update({name: getattr(args, name) for name in names})
    with staged_output(args.output_dir) as folder:
        report.to_json(folder / "report.json")
        (folder / "table.md").write_text(report.to_table())
        if report.pairs:
            report.picture_sheet(folder / "sheet.png")
    logger.info(f"Wrote {args.output_dir}\n{report.to_table(per_prompt=False)}")


@one_run_a_folder
def main(args: argparse.Namespace) -> ForgettingReport:
    """Draw, measure and write; returns the report."""
    asked = check_args(args)
    accelerator = make_accelerator(args)
    if accelerator.num_processes > 1:
        raise ValueError(
            f"The evaluation must be one process, got {accelerator.num_processes}. Pass "
            "`--num_processes 1` to `accelerate launch`."
        )
    pipeline = load_pipeline(args, accelerator.device, WEIGHT_DTYPES[args.mixed_precision])
    decode_in_pipeline_dtype(pipeline)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # two pictures blackened by it would count as no drift
    load_loras(pipeline, args.lora)
    report = evaluate_forgetting(
        pipeline,
        None,
        subject_prompts=args.subject_prompt,
        distribution=args.distribution,
        num_images_per_prompt=args.num_images_per_prompt,
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        negative_prompt=args.negative_prompt or None,
        height=args.height,
        width=args.width,
        batch_size=args.batch_size,
        sheet_prompts=args.sheet_prompts,
        **asked,
        **make_features(args, accelerator.device),
    )
    write_report(args, report)
    return report


if __name__ == "__main__":
    run_script(parse_args, main)
