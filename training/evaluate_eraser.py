"""Compare CogVideoX with and without erasers at the same seeds: what is gone, and what was kept.

    python training/evaluate_eraser.py \\
        --pretrained_model_name_or_path examples/moving_digits/model --eraser outputs/no_seven \\
        --evaluation_prompts prompts.csv --judge examples.moving_digits.judge:MovingDigitsJudge \\
        --concept_aspect digit --num_inference_steps 20 --sampling_guidance_scale 3 \\
        --sampling_batch_size 50 --output_dir outputs/evaluation

The csv has the columns prompt, group and maybe seed. The groups `target` and `preserved` are needed;
further ones, e.g. paraphrases of the target, are reported beside them. For a real model:
`--judge clip --classes dog cat horse "something else" --target_concept dog`, or `--judge nudenet`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import CogVideoXPipeline


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.core.base_source import refuse_single_file
from diffusers_ext.eraser.loading import load_eraser
from diffusers_ext.evaluation.clip_detector import CLIPDetector
from diffusers_ext.evaluation.clip_sheet import check_clip_format
from diffusers_ext.evaluation.clip_verdicts import ClipJudge
from diffusers_ext.evaluation.erasure import evaluate_erasure
from diffusers_ext.evaluation.erasure_report import ErasureReport
from diffusers_ext.evaluation.nudenet_detector import EXPOSED, LENIENT, NudeNetDetector
from diffusers_ext.rewards import CLIPScoreReward
from training.erasure_arguments import (
    CLIP,
    NUDENET,
    check_erasure_arguments,
    parse_erasure_arguments,
    read_erasure_prompts,
)
from training.output_folder import check_output_dir, one_run_a_folder, staged_output
from training.plugins import load_judge
from training.run_setup import WEIGHT_DTYPES, make_accelerator
from training.script_entry import run_script
from training.text_pipeline import read_components


logger = get_logger(__name__)


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this script, over the YAML file of `--config`."""
    return parse_erasure_arguments(__doc__, input_args)


def load_clip_judge(args: argparse.Namespace, device: torch.device) -> ClipJudge:
    """The detector of `--judge`."""
    if args.judge == NUDENET:
        return NudeNetDetector.from_installed(
            args.judge_model,
            args.nudenet_resolution,
            threshold=args.nudenet_threshold,
            labels=LENIENT if args.nudenet_lenient else EXPOSED,
            frames=args.judge_frames,
        )
    if args.judge == CLIP:
        return CLIPDetector(
            CLIPScoreReward.from_pretrained(args.judge_model, device=device),
            args.classes,
            args.target_concept,
            template=args.class_template,
            frames=args.judge_frames or 8,
        )
    return load_judge(args.judge)


def load_pipeline(args: argparse.Namespace, device: torch.device) -> CogVideoXPipeline:
    """The base model with all erasers, switched on.

    Raises:
        ValueError: no CogVideoX text-to-video pipeline, or an eraser of another model.
    """
    source = args.pretrained_model_name_or_path
    refuse_single_file(source, f"a {CogVideoXPipeline.__name__}")
    kind = read_components(args)["_class_name"]
    if kind != CogVideoXPipeline.__name__:
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a CogVideoXPipeline, got a {kind} in {source}."
        )
    pipeline = CogVideoXPipeline.from_pretrained(
        source,
        revision=args.revision,
        variant=args.variant,
        dtype=WEIGHT_DTYPES[args.mixed_precision],
    )
    for index, eraser in enumerate(args.eraser):
        load_eraser(pipeline, eraser, adapter_name=f"evaluated_{index}")
    if args.vae_tiling:
        pipeline.vae.enable_tiling()
    if args.model_cpu_offload:
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)


def write_report(args: argparse.Namespace, report: ErasureReport) -> None:
    """Write `report.json`, `clips.csv`, `table.md`, `sheet.png` and `clips/`."""
    names: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("pretrained_model_name_or_path", "revision", "eraser", "evaluation_prompts")
    }
    report.settings.update(names)
    with staged_output(args.output_dir) as folder:
        report.save(folder, args.clip_format, args.fps)
    logger.info(f"Wrote {args.output_dir}\n{report.to_table()}")


@one_run_a_folder
def main(args: argparse.Namespace) -> ErasureReport:
    """Draw, judge, measure and write; returns the report."""
    check_erasure_arguments(args)
    check_clip_format(args.clip_format)
    check_output_dir(args)
    prompts = read_erasure_prompts(args.evaluation_prompts)
    accelerator = make_accelerator(args)
    if accelerator.num_processes > 1:
        raise ValueError(
            f"The evaluation must be one process, got {accelerator.num_processes}. Pass "
            "`--num_processes 1` to `accelerate launch`."
        )
    judge = load_clip_judge(args, accelerator.device)
    pipeline = load_pipeline(args, accelerator.device)
    report = evaluate_erasure(
        pipeline,
        prompts.groups,
        judge,
        concept_aspect=args.concept_aspect,
        scales=args.scale,
        num_videos_per_prompt=args.num_videos_per_prompt,
        seed=args.seed,
        seeds=prompts.seeds,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.sampling_guidance_scale,
        negative_prompt=args.negative_prompt or None,
        num_frames=args.num_frames,
        height=args.height,
        width=args.width,
        batch_size=args.sampling_batch_size,
        kept_clips=args.kept_clips,
    )
    write_report(args, report)
    return report


if __name__ == "__main__":
    run_script(parse_args, main)
