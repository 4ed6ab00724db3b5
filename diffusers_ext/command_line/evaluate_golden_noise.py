"""`diffusers-ext evaluate golden-noise`: golden noise against random noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ext.command_line.evaluate import Evaluation
from diffusers_ext.command_line.options import (
    chosen_device,
    load_base_pipeline,
    load_features,
    load_rewards,
    picture_arguments,
)
from diffusers_ext.evaluation.settings import GoldenNoiseEvaluationSettings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport, Refine


def compare_noise(settings: GoldenNoiseEvaluationSettings, show_progress: bool = True) -> GoldenNoiseReport:
    """Draw, score, measure and write."""
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.core.text_files import read_prompt_texts
    from diffusers_ext.evaluation.golden_noise import evaluate_golden_noise

    column = settings.prompt_column
    prompts = read_prompt_texts(settings.prompt_file, column, argument="prompt_file")
    device = chosen_device(settings)
    rewards = load_rewards(settings, device)
    features = load_features(settings, device).get("features")
    pipeline = load_base_pipeline(settings)
    with staged_output(settings.output_dir) as folder:
        report = evaluate_golden_noise(
            pipeline,
            prompts[: settings.max_prompts],
            refine=_load_subjects(settings, pipeline),
            rewards=rewards,
            best_of=settings.best_of,
            features=features,
            images_dir=folder / "images" if settings.save_images else None,
            show_progress=show_progress,
            **picture_arguments(settings),
        )
        names = ("pretrained_model_name_or_path", "revision", "noise_model", "prompt_file")
        report.settings.update({name: getattr(settings, name) for name in names})
        report.save(folder)
    return report


def _load_subjects(settings: GoldenNoiseEvaluationSettings, pipeline: DiffusionPipeline) -> dict[str, Refine]:
    """Targets by their repeats, networks by the names of their folders."""
    from diffusers_ext.evaluation.golden_noise_report import NetworkRefiner, RedenoisedTarget
    from diffusers_ext.golden_noise.networks.base import load_noise_model

    step = {name: getattr(settings, name) for name in ("w1", "w2", "legacy_inversion")}
    step["num_steps"] = settings.redenoise_steps
    subjects: dict[str, Any] = {
        f"{repeats}-step target": RedenoisedTarget(pipeline, repeats, **step)
        for repeats in dict.fromkeys(settings.target_steps)
    }
    for source in dict.fromkeys(settings.noise_model):
        network = load_noise_model(source).to(pipeline.device)
        name = Path(source).name or type(network).__name__
        if name in subjects:
            name = f"{name} ({len(subjects) + 1})"
        subjects[name] = NetworkRefiner(network, settings.golden_noise_scale)
    return subjects


GOLDEN_NOISE = Evaluation(
    GoldenNoiseEvaluationSettings, compare_noise, "GOLDEN_NOISE_RUNS", reason=": what it times must run alone"
)
EVALUATE_GOLDEN_NOISE = GOLDEN_NOISE.command(
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
)
