"""`diffusers-ext evaluate golden-noise`: golden noise against random noise."""

from __future__ import annotations

import argparse
import math
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
    check_values,
    chosen_device,
    load_base_pipeline,
    load_features,
    load_rewards,
    picture_arguments,
    report_outcome,
)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
    from diffusers_ext.evaluation.golden_noise_subjects import Refine


def add_golden_noise_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, on which prompts and by which rewards."""
    add_base_model_arguments(parser, aliases=["--base_model_id"])
    parser.add_argument("--output_dir", required=True, help="folder of the report")
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--noise_model",
        "--npnet_weights_path",
        action="append",
        default=[],
        help="folder, Hub name, or NPNet's single file; may be repeated",
    )
    group.add_argument("--golden_noise_scale", type=float, default=1.0, help="of the networks")
    group.add_argument(
        "--prompt_file", required=True, help="text file, one prompt a line, or csv; no comments"
    )
    group.add_argument("--prompt_column", default="prompt", help="of a csv file")
    group.add_argument("--max_prompts", type=int, help="only the first so many")
    group.add_argument(
        "--reward",
        action="append",
        default=[],
        required=True,
        help="hpsv2, pickscore, clip_score or module:attribute; may be repeated, the first decides",
    )
    group.add_argument(
        "--reward_model",
        action="append",
        default=[],
        help="REWARD=folder, file or Hub name; of a single reward without REWARD=",
    )
    group.add_argument(
        "--reward_version", action="append", default=[], help="the same for v2.1 etc."
    )
    group.add_argument("--save_images", action="store_true", help="all pictures, under images/")
    group.add_argument("--best_of", type=int, default=4, help="random noises; 1 for no comparison")
    add_feature_arguments(group, "the diversity")
    group = parser.add_argument_group("re-denoised targets")
    group.add_argument(
        "--target_steps",
        type=int,
        action="append",
        default=[],
        help="also evaluate the noise re-denoised so often; may be repeated",
    )
    group.add_argument("--redenoise_steps", type=int, default=10, help="the fewer, the stronger")
    group.add_argument("--w1", type=float, default=5.5, help="guidance of the step down")
    group.add_argument("--w2", type=float, default=1.0, help="guidance of the step up")
    group.add_argument("--legacy_inversion", action="store_true", help="the published form")
    add_picture_arguments(parser)


def compare_noise(args: argparse.Namespace) -> GoldenNoiseReport:
    """Draw, score, measure and write."""
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.core.text_tables import read_prompt_texts
    from diffusers_ext.evaluation.golden_noise import evaluate_golden_noise

    _check(args)
    prompts = read_prompt_texts(args.prompt_file, args.prompt_column, argument="prompt_file")
    device = chosen_device(args)
    rewards, features = load_rewards(args, device), load_features(args, device).get("features")
    pipeline = load_base_pipeline(args)
    with staged_output(args.output_dir) as folder:
        report = evaluate_golden_noise(
            pipeline,
            prompts[: args.max_prompts],
            refine=_load_subjects(args, pipeline),
            rewards=rewards,
            best_of=args.best_of,
            features=features,
            images_dir=folder / "images" if args.save_images else None,
            **picture_arguments(args),
        )
        names = ("pretrained_model_name_or_path", "revision", "noise_model", "prompt_file")
        report.settings.update({name: getattr(args, name) for name in names})
        report.save(folder)
    return report


def run_golden_noise(args: argparse.Namespace) -> Outcome:
    """Compare, and say what was found."""
    report = compare_noise(args)
    return report_outcome(report, Path(args.output_dir), report.to_table())


def _check(args: argparse.Namespace) -> None:
    check_drawing_arguments(args, (*COUNTS, "best_of", "max_prompts"))
    check_values(args, ["redenoise_steps"], "at least 2", lambda value: value >= 2)
    numbers = ("w1", "w2", "guidance_scale", "golden_noise_scale")
    check_values(args, numbers, "a finite number", math.isfinite)
    check_values(
        args, ["target_steps"], "at least 1 each", lambda steps: all(step >= 1 for step in steps)
    )
    if not args.noise_model and not args.target_steps:
        raise ValueError("`noise_model` or `target_steps` must be given: what should be evaluated?")
    if not args.reward:
        raise ValueError("`reward` must be given at least once: what makes a picture better?")
    if args.dino and args.clip:
        raise ValueError("`dino` must not be given together with `clip`.")


def _load_subjects(args: argparse.Namespace, pipeline: DiffusionPipeline) -> dict[str, Refine]:
    """Targets by their repeats, networks by the names of their folders."""
    from diffusers_ext.evaluation.golden_noise_subjects import NetworkRefiner, RedenoisedTarget
    from diffusers_ext.golden_noise.networks.loading import load_noise_model

    step = {"num_steps": args.redenoise_steps, "w1": args.w1, "w2": args.w2}
    step["legacy_inversion"] = args.legacy_inversion
    subjects: dict[str, Any] = {
        f"{repeats}-step target": RedenoisedTarget(pipeline, repeats, **step)
        for repeats in dict.fromkeys(args.target_steps)
    }
    for source in dict.fromkeys(args.noise_model):
        network = load_noise_model(source).to(pipeline.device)
        name = Path(source).name or type(network).__name__
        if name in subjects:
            name = f"{name} ({len(subjects) + 1})"
        subjects[name] = NetworkRefiner(network, args.golden_noise_scale)
    return subjects


EVALUATE_GOLDEN_NOISE = Command(
    "evaluate golden-noise",
    "golden noise against random noise from the same seeds",
    "Draw every picture from its seed's noise and from what networks make of it, and score both. Writes "
    "report.json, table.md, pictures.csv and sheet.png.",
    (
        "evaluate golden-noise --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 "
        "--noise_model user/golden-noise --prompt_file prompts.txt --reward hpsv2 --reward clip_score "
        "--mixed_precision fp16 --output_dir evaluation",
        "evaluate golden-noise --pretrained_model_name_or_path examples/digits/model --target_steps 1 "
        "--prompt_file prompts.txt --reward clip_score --reward_model openai/clip-vit-base-patch32 "
        "--output_dir evaluation --json",
    ),
    add_golden_noise_arguments,
    run_golden_noise,
    output="output_dir",
    result_names=("report.json",),
)
