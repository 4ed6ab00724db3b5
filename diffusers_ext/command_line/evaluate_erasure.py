"""`diffusers-ext evaluate erasure`: CogVideoX with and without erasers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers_ext.command_line.evaluate import Evaluation
from diffusers_ext.command_line.options import check_pipeline_class, chosen_device, load_base_pipeline
from diffusers_ext.evaluation.settings import ErasureSettings

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from diffusers_ext.evaluation.erasure_report import ErasureReport
    from diffusers_ext.evaluation.erasure_rows import ClipJudge


def compare_erasers(settings: ErasureSettings, show_progress: bool = True) -> ErasureReport:
    """Draw, judge, measure and write."""
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.core.text_files import read_grouped_prompts
    from diffusers_ext.evaluation.erasure import evaluate_erasure
    from diffusers_ext.evaluation.report_files import check_clip_format

    check_clip_format(settings.clip_format)
    prompts, seeds = read_grouped_prompts(settings.evaluation_prompts, "evaluation_prompts")
    missing = [name for name in ("target", "preserved") if name not in prompts]
    if missing:
        raise ValueError(
            "`evaluation_prompts` must have rows of group 'target' and 'preserved', got none of "
            f"{missing} in {settings.evaluation_prompts}."
        )
    check_pipeline_class(settings, "eraser")
    device = chosen_device(settings)
    judge = _load_judge(settings, device)
    report = evaluate_erasure(
        _load_erased_pipeline(settings, device),
        prompts,
        judge,
        concept_aspect=settings.concept_aspect,
        scales=settings.scale,
        num_videos_per_prompt=settings.num_videos_per_prompt,
        seed=settings.seed,
        seeds=seeds,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.sampling_guidance_scale,
        negative_prompt=settings.negative_prompt or None,
        num_frames=settings.num_frames,
        height=settings.height,
        width=settings.width,
        batch_size=settings.sampling_batch_size,
        kept_clips=settings.kept_clips,
        show_progress=show_progress,
    )
    names = ("pretrained_model_name_or_path", "revision", "eraser", "evaluation_prompts")
    report.settings.update({name: getattr(settings, name) for name in names})
    with staged_output(settings.output_dir) as folder:
        report.save(folder, settings.clip_format, settings.fps)
    return report


def _load_judge(settings: ErasureSettings, device: torch.device) -> ClipJudge:
    from diffusers_ext.evaluation.judges import EXPOSED, LENIENT, CLIPDetector, NudeNetDetector, load_judge
    from diffusers_ext.rewards import CLIPScoreReward

    if settings.judge == "nudenet":
        return NudeNetDetector.from_installed(
            settings.judge_model,
            settings.nudenet_resolution,
            threshold=settings.nudenet_threshold,
            labels=LENIENT if settings.nudenet_lenient else EXPOSED,
            frames=settings.judge_frames,
        )
    if settings.judge != "clip":
        return load_judge(settings.judge)
    source = () if settings.judge_model is None else (settings.judge_model,)
    return CLIPDetector(
        CLIPScoreReward.from_pretrained(*source, device=device),
        settings.classes,
        settings.target_concept,
        template=settings.class_template,
        frames=settings.judge_frames or 8,
    )


def _load_erased_pipeline(settings: ErasureSettings, device: torch.device) -> DiffusionPipeline:
    from diffusers_ext.eraser.files import load_eraser

    pipeline = load_base_pipeline(settings, "eraser", place=False)
    for index, eraser in enumerate(settings.eraser):
        load_eraser(pipeline, eraser, adapter_name=f"evaluated_{index}")
    if settings.vae_tiling:
        pipeline.vae.enable_tiling()
    if settings.model_cpu_offload:
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)


ERASURE = Evaluation(ErasureSettings, compare_erasers, "ERASER_RUNS")
EVALUATE_ERASURE = ERASURE.command(
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
)
