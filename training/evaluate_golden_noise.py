"""Compare golden noise with random noise from the same seeds: is it better, and what does it cost?

    python training/evaluate_golden_noise.py \\
        --pretrained_model_name_or_path examples/digits/model \\
        --noise_model outputs/golden_noise_model --target_steps 1 \\
        --prompt_file held_out.txt --num_inference_steps 6 --guidance_scale 1.5 \\
        --reward examples.digits.rewards:DigitsReward \\
        --reward examples.digits.rewards:SecondDigitsReward --output_dir outputs/evaluation
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.evaluation.features import CLIPFeatures, DINOv2Features, FeatureExtractor
from diffusers_ext.evaluation.golden_noise import evaluate_golden_noise
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.evaluation.golden_noise_subjects import NetworkRefiner, RedenoisedTarget, Refine
from diffusers_ext.golden_noise.loading import load_noise_model
from diffusers_ext.rewards import Reward
from training.golden_evaluation_arguments import (
    by_reward,
    check_golden_evaluation_arguments,
    parse_golden_evaluation_arguments,
)
from training.output_folder import check_output_dir, one_run_a_folder, staged_output
from training.pair_rendering import load_base_pipeline
from training.plugins import load_reward
from training.prompt_files import read_prompt_file
from training.run_setup import WEIGHT_DTYPES, make_accelerator
from training.script_entry import run_script


logger = get_logger(__name__)


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this script, over the YAML file of `--config`."""
    return parse_golden_evaluation_arguments(__doc__, input_args)


def load_rewards(args: argparse.Namespace, device: torch.device) -> list[Reward]:
    """The rewards of the command line, in their order."""
    models, versions = by_reward(args, "reward_model"), by_reward(args, "reward_version")
    return [
        load_reward(spec, model=models.get(spec), version=versions.get(spec), device=device)
        for spec in args.reward
    ]


def load_subjects(args: argparse.Namespace, pipeline: DiffusionPipeline) -> dict[str, Refine]:
    """What is evaluated: targets by their repeats, networks by the names of their folders."""
    subjects: dict[str, Refine] = {}
    for repeats in dict.fromkeys(args.target_steps):
        subjects[f"{repeats}-step target"] = RedenoisedTarget(
            pipeline,
            repeats,
            num_steps=args.redenoise_steps,
            w1=args.w1,
            w2=args.w2,
            legacy_inversion=args.legacy_inversion,
        )
    for source in dict.fromkeys(args.noise_model):
        network = load_noise_model(source).to(pipeline.device)
        name = Path(source).name or type(network).__name__
        if name in subjects:
            name = f"{name} ({len(subjects) + 1})"
        subjects[name] = NetworkRefiner(network, args.golden_noise_scale)
    return subjects


def load_features(args: argparse.Namespace, device: torch.device) -> FeatureExtractor | None:
    """The features of `--dino` or `--clip`."""
    if args.dino is not None:
        return DINOv2Features.from_pretrained(args.dino, device=device)
    return None if args.clip is None else CLIPFeatures.from_pretrained(args.clip, device=device)


def write_report(args: argparse.Namespace, report: GoldenNoiseReport, folder: Path) -> None:
    """Write `report.json`, `pictures.csv`, `table.md` and `sheet.png`."""
    names: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("pretrained_model_name_or_path", "revision", "noise_model", "prompt_file")
    }
    report.settings.update(names)
    report.to_json(folder / "report.json")
    report.to_csv(folder / "pictures.csv")
    (folder / "table.md").write_text(report.to_table(), encoding="utf-8")
    if report.kept:
        report.picture_sheet(folder / "sheet.png")


@one_run_a_folder
def main(args: argparse.Namespace) -> GoldenNoiseReport:
    """Draw, score, measure and write; returns the report."""
    check_golden_evaluation_arguments(args)
    check_output_dir(args)
    prompts = read_prompt_file(args.prompt_file, args.prompt_column)[: args.max_prompts]
    accelerator = make_accelerator(args)
    if accelerator.num_processes > 1:
        raise ValueError(
            f"The evaluation must be one process, got {accelerator.num_processes}: what it times "
            "must run alone. Pass `--num_processes 1` to `accelerate launch`."
        )
    rewards = load_rewards(args, accelerator.device)
    features = load_features(args, accelerator.device)
    dtype = WEIGHT_DTYPES[args.mixed_precision]
    pipeline = load_base_pipeline(args, accelerator.device, dtype)
    with staged_output(args.output_dir) as folder:
        report = evaluate_golden_noise(
            pipeline,
            prompts,
            refine=load_subjects(args, pipeline),
            rewards=rewards,
            num_images_per_prompt=args.num_images_per_prompt,
            seed=args.seed,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            negative_prompt=args.negative_prompt or None,
            height=args.height,
            width=args.width,
            best_of=args.best_of,
            features=features,
            batch_size=args.batch_size,
            sheet_prompts=args.sheet_prompts,
            images_dir=folder / "images" if args.save_images else None,
        )
        write_report(args, report, folder)
    logger.info(f"Wrote {args.output_dir}\n{report.to_table()}")
    return report


if __name__ == "__main__":
    run_script(parse_args, main)
