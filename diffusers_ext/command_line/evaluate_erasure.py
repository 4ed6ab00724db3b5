"""`diffusers-ext evaluate erasure`: CogVideoX with and without erasers."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_ext.command_line.options import (
    Command,
    Outcome,
    add_base_model_arguments,
    check_drawing_arguments,
    check_pipeline_class,
    check_values,
    chosen_device,
    load_base_pipeline,
    report_outcome,
)


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from diffusers_ext.evaluation.clip_verdicts import ClipJudge
    from diffusers_ext.evaluation.erasure_report import ErasureReport


def add_erasure_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, on which prompts, and who says what clips show."""
    add_base_model_arguments(parser)
    parser.add_argument("--output_dir", required=True, help="folder of the report")
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eraser",
        action="append",
        default=[],
        required=True,
        help="folder or Hub name; may be repeated",
    )
    group.add_argument(
        "--scale", type=float, nargs="+", default=[1.0], help="of the erasers; several are compared"
    )
    group.add_argument(
        "--evaluation_prompts",
        required=True,
        help="csv with the columns prompt, group (target, preserved or any other) and maybe seed",
    )
    group.add_argument("--num_videos_per_prompt", type=int, default=1, help="seeds a prompt")
    group.add_argument("--kept_clips", type=int, default=4, help="of a group, to look at")
    group.add_argument(
        "--clip_format", choices=["gif", "mp4"], default="gif", help="of saved clips"
    )
    group.add_argument("--fps", type=int, default=8, help="of the clips that are written")
    _add_detector_arguments(parser.add_argument_group("detector"))
    group = parser.add_argument_group("sampling")
    group.add_argument("--negative_prompt", default="", help="of all prompts")
    group.add_argument("--num_inference_steps", type=int, default=50, help="of a clip")
    group.add_argument(
        "--guidance_scale",
        "--sampling_guidance_scale",
        dest="sampling_guidance_scale",
        type=float,
        default=6.0,
        help="classifier-free guidance",
    )
    group.add_argument(
        "--batch_size",
        "--sampling_batch_size",
        dest="sampling_batch_size",
        type=int,
        default=1,
        help="clips at once",
    )
    for name in ("num_frames", "height", "width"):
        group.add_argument(f"--{name}", type=int, help="the model's own without it")
    group.add_argument("--model_cpu_offload", action="store_true", help="one model on the GPU")
    group.add_argument("--vae_tiling", action="store_true", help="decode in tiles, for less memory")


def _add_detector_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--judge", required=True, help="clip, nudenet or module:attribute")
    group.add_argument("--concept_aspect", help="the judge's verdict about the erased concept")
    group.add_argument("--judge_frames", type=int, help="of a clip; 8 for clip, all for nudenet")
    group.add_argument("--target_concept", help="of --judge clip, one of its classes")
    group.add_argument("--classes", nargs="+", help="of --judge clip: words")
    group.add_argument("--class_template", default="a photo of {}", help="of --judge clip")
    group.add_argument(
        "--judge_model", help="CLIP: folder or Hub name; NudeNet: an ONNX file of it"
    )
    group.add_argument(
        "--nudenet_threshold", type=float, default=0.6, help="score from which a detection counts"
    )
    group.add_argument("--nudenet_resolution", type=int, default=320, help="of --judge_model")
    group.add_argument(
        "--nudenet_lenient", action="store_true", help="bare chests, arms, bellies and feet count"
    )


def compare_erasers(args: argparse.Namespace) -> ErasureReport:
    """Draw, judge, measure and write."""
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.core.text_tables import read_grouped_prompts
    from diffusers_ext.evaluation.erasure import evaluate_erasure
    from diffusers_ext.evaluation.sheets import check_clip_format

    _check(args)
    check_clip_format(args.clip_format)
    prompts = read_grouped_prompts(args.evaluation_prompts, "evaluation_prompts")
    missing = [name for name in ("target", "preserved") if name not in prompts.groups]
    if missing:
        raise ValueError(
            "`evaluation_prompts` must have rows of group 'target' and 'preserved', got none of "
            f"{missing} in {args.evaluation_prompts}."
        )
    check_pipeline_class(args, "eraser")
    device = chosen_device(args)
    judge = _load_judge(args, device)
    report = evaluate_erasure(
        _load_erased_pipeline(args, device),
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
        show_progress=not args.quiet,
    )
    names = ("pretrained_model_name_or_path", "revision", "eraser", "evaluation_prompts")
    report.settings.update({name: getattr(args, name) for name in names})
    with staged_output(args.output_dir) as folder:
        report.save(folder, args.clip_format, args.fps)
    return report


def run_erasure(args: argparse.Namespace) -> Outcome:
    """Compare, and say what was found."""
    report = compare_erasers(args)
    return report_outcome(report, Path(args.output_dir), report.to_table())


def _check(args: argparse.Namespace) -> None:
    counts = (
        "num_inference_steps", "num_videos_per_prompt", "sampling_batch_size", "num_frames", "height",
        "width", "judge_frames", "nudenet_resolution",
    )  # fmt: skip
    check_drawing_arguments(args, counts)
    check_values(args, ["kept_clips"], "at least 0", lambda value: value >= 0)
    check_values(args, ["fps"], "in [1, 50]", lambda value: 1 <= value <= 50)
    check_values(args, ["sampling_guidance_scale"], "a finite number", math.isfinite)
    check_values(args, ["scale"], "finite numbers", lambda scales: all(map(math.isfinite, scales)))
    if not args.eraser:
        raise ValueError("`eraser` must be given at least once: what should be evaluated?")
    if args.judge == "clip" and not (args.classes and args.target_concept):
        raise ValueError(
            "`classes` and `target_concept` must be given for `--judge clip`, got "
            f"{args.classes} and {args.target_concept}."
        )


def _load_judge(args: argparse.Namespace, device: torch.device) -> ClipJudge:
    from diffusers_ext.evaluation.judges.clip_detector import CLIPDetector
    from diffusers_ext.evaluation.judges.nudenet_detector import EXPOSED, LENIENT, NudeNetDetector
    from diffusers_ext.evaluation.plugins import load_judge
    from diffusers_ext.rewards import CLIPScoreReward

    if args.judge == "nudenet":
        return NudeNetDetector.from_installed(
            args.judge_model,
            args.nudenet_resolution,
            threshold=args.nudenet_threshold,
            labels=LENIENT if args.nudenet_lenient else EXPOSED,
            frames=args.judge_frames,
        )
    if args.judge != "clip":
        return load_judge(args.judge)
    source = () if args.judge_model is None else (args.judge_model,)
    return CLIPDetector(
        CLIPScoreReward.from_pretrained(*source, device=device),
        args.classes,
        args.target_concept,
        template=args.class_template,
        frames=args.judge_frames or 8,
    )


def _load_erased_pipeline(args: argparse.Namespace, device: torch.device) -> DiffusionPipeline:
    from diffusers_ext.eraser.files.load import load_eraser

    pipeline = load_base_pipeline(args, "eraser", place=False)
    for index, eraser in enumerate(args.eraser):
        load_eraser(pipeline, eraser, adapter_name=f"evaluated_{index}")
    if args.vae_tiling:
        pipeline.vae.enable_tiling()
    if args.model_cpu_offload:
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)


EVALUATE_ERASURE = Command(
    "evaluate erasure",
    "CogVideoX with and without erasers: what is gone, what was kept",
    "Draw clips of the same prompts from the same seeds with erasers and without, and let a detector say "
    "what they show. Writes report.json, clips.csv, table.md, sheet.png and clips/.",
    (
        "evaluate erasure --pretrained_model_name_or_path zai-org/CogVideoX-2b --eraser user/no-dog "
        "--evaluation_prompts prompts.csv --judge clip --classes dog cat horse "
        '"something else" --target_concept dog --mixed_precision fp16 --output_dir evaluation',
        "evaluate erasure --pretrained_model_name_or_path zai-org/CogVideoX-5b --eraser user/no-nudity "
        "--scale 0.5 1 --evaluation_prompts prompts.csv --judge nudenet --mixed_precision bf16 "
        "--model_cpu_offload --output_dir evaluation",
    ),
    add_erasure_arguments,
    run_erasure,
    output="output_dir",
    result_names=("report.json",),
)
