"""`diffusers-ext evaluate forgetting`, `golden-noise`, `erasure`: on the console, over a YAML file, and as scripts."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ext.command_line.options import (
    Command,
    Outcome,
    check_pipeline_class,
    chosen_device,
    load_base_pipeline,
    load_features,
    load_rewards,
    picture_arguments,
    report_outcome,
)
from diffusers_ext.core.settings import Settings
from diffusers_ext.documented_names import read_nullbooth_block
from diffusers_ext.evaluation.settings import ErasureSettings, ForgettingSettings, GoldenNoiseEvaluationSettings
from diffusers_ext.training.run.settings import (
    add_settings,
    file_flags,
    file_reader,
    parse_settings,
    required_names,
    settings_of,
    settings_parser,
)

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from diffusers_ext.evaluation.erasure_report import ErasureReport
    from diffusers_ext.evaluation.forgetting import ForgettingReport
    from diffusers_ext.evaluation.golden_noise import Refine
    from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
    from diffusers_ext.evaluation.judges import ClipJudge
    from diffusers_ext.evaluation.report_files import SavedReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, for the console and as a script."""

    settings_class: type[Settings]
    compare: Callable[[Any, bool], SavedReport]  # draws, measures and writes; its bool: whether to show bars
    shared: str  # name in `training.run.setup` of the runs that share its YAML file
    read_block: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # of the file, into flat names
    reason: str = ""  # for which it must run in one process
    table: tuple[tuple[str, Any], ...] = ()  # options of the report's table for people

    def command(self, name: str, summary: str, description: str, examples: tuple[str, ...]) -> Command:
        """The console's command."""
        return Command(
            name,
            summary,
            description,
            examples,
            self._add_arguments,
            self._run,
            output="output_dir",
            result_names=("report.json",),
            over_file=self._over_file,
        )

    def script(self, description: str | None) -> tuple[Callable[..., Any], Callable[[Any], SavedReport]]:
        """`parse_args` and `main` of a script; the latter returns the report."""
        from diffusers_ext.training.run.script import one_run_a_folder

        def parse_args(input_args: Sequence[str] | None = None) -> Settings:
            return parse_settings(self.settings_class, description, input_args, self.read_block, self._runs())

        return parse_args, one_run_a_folder(self._launched)

    def _runs(self) -> Sequence[type[Settings]]:
        from diffusers_ext.training.run import setup

        return getattr(setup, self.shared)

    def _add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_settings(parser, self.settings_class)
        names = required_names(self.settings_class)
        for action in parser._actions:
            action.required = action.dest in names

    def _over_file(self, words: Sequence[str]) -> list[str]:
        """The flags that the file of `--config` stands for."""
        parser = settings_parser(self.settings_class)
        return file_flags(parser, words, file_reader(self.settings_class, self.read_block), self._runs())

    def _run(self, args: argparse.Namespace) -> Outcome:
        settings: Any = settings_of(args, self.settings_class)
        if settings.allow_tf32:
            import torch

            torch.backends.cuda.matmul.allow_tf32 = True
        report = self.compare(settings, not args.quiet)
        return report_outcome(report, Path(settings.output_dir), report.to_table(**dict(self.table)))

    def _launched(self, settings: Any) -> SavedReport:
        from diffusers_ext.training.run.script import check_output_dir
        from diffusers_ext.training.run.setup import make_accelerator

        check_output_dir(settings)
        accelerator = make_accelerator(settings)
        if accelerator.num_processes > 1:
            raise ValueError(
                f"The evaluation must be one process, got {accelerator.num_processes}{self.reason}. "
                "Pass `--num_processes 1` to `accelerate launch`."
            )
        settings.device = settings.device or accelerator.device
        report = self.compare(settings, True)
        logger.info("Wrote %s\n%s", settings.output_dir, report.to_table(**dict(self.table)))
        return report


def name_subject(report: SavedReport, settings: Settings, *names: str) -> None:
    """Let a report say of what it is."""
    report.settings.update({name: getattr(settings, name) for name in names})


def compare_loras(settings: ForgettingSettings, show_progress: bool = True) -> ForgettingReport:
    """Draw a model with and without LoRAs, measure and write."""
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.core.sources import lora_file
    from diffusers_ext.evaluation.features import PixelFeatures
    from diffusers_ext.evaluation.forgetting import evaluate_forgetting

    asked, files = _read_files(settings), [lora_file(source) for source in settings.lora]
    pipeline = load_base_pipeline(settings)
    if settings.enable_xformers_memory_efficient_attention:
        pipeline.unet.enable_xformers_memory_efficient_attention()
    load_loras(pipeline, settings.lora, files)
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
    name_subject(report, settings, "pretrained_model_name_or_path", "lora", "judge", "subject_judge", "dino", "clip")
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


def load_loras(pipeline: DiffusionPipeline, sources: list[str], files: list[Path], argument: str = "lora") -> None:
    """All LoRAs at once, each at scale 1; raises `ValueError` for one without effect, by the name of the argument."""
    from diffusers_ext.families.lora_files import check_loaded_lora

    names = [f"lora_{index}" for index in range(len(files))]
    for name, source, file in zip(names, sources, files, strict=True):
        try:
            with warnings.catch_warnings():
                # Several at once are what is asked for.
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
            check_loaded_lora(pipeline, name)
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"`{argument}` must be a LoRA for this model, got {source}. {error}") from error
    pipeline.set_adapters(names)


def compare_noise(settings: GoldenNoiseEvaluationSettings, show_progress: bool = True) -> GoldenNoiseReport:
    """Draw from random and from golden noise, score, measure and write."""
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.core.text_files import read_prompt_texts
    from diffusers_ext.evaluation.golden_noise import evaluate_golden_noise

    prompts = read_prompt_texts(settings.prompt_file, settings.prompt_column, argument="prompt_file")
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
        name_subject(report, settings, "pretrained_model_name_or_path", "revision", "noise_model", "prompt_file")
        report.save(folder)
    return report


def _load_subjects(settings: GoldenNoiseEvaluationSettings, pipeline: DiffusionPipeline) -> dict[str, Refine]:
    """Targets by their repeats, networks by the names of their folders."""
    from diffusers_ext.evaluation.golden_noise import NetworkRefiner, RedenoisedTarget
    from diffusers_ext.golden_noise.networks.base import load_noise_model

    step = {name: getattr(settings, name) for name in ("w1", "w2", "legacy_inversion")}
    subjects: dict[str, Any] = {
        f"{repeats}-step target": RedenoisedTarget(pipeline, repeats, num_steps=settings.redenoise_steps, **step)
        for repeats in settings.target_steps
    }
    for source in dict.fromkeys(settings.noise_model):
        network = load_noise_model(source).to(pipeline.device)
        name = Path(source).name or type(network).__name__
        if name in subjects:
            name = f"{name} ({len(subjects) + 1})"
        subjects[name] = NetworkRefiner(network, settings.golden_noise_scale, pipeline)
    return subjects


def compare_erasers(settings: ErasureSettings, show_progress: bool = True) -> ErasureReport:
    """Draw a model with and without erasers, judge, measure and write."""
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.core.text_files import read_grouped_prompts
    from diffusers_ext.evaluation.attack_prompts import attack_groups
    from diffusers_ext.evaluation.erasure import evaluate_erasure
    from diffusers_ext.evaluation.erasure_attacks import check_base, make_attacks, not_covered, read_frames
    from diffusers_ext.evaluation.report_files import check_clip_format

    check_clip_format(settings.clip_format)
    prompts, seeds = read_grouped_prompts(settings.evaluation_prompts, "evaluation_prompts")
    missing = [name for name in ("target", "preserved") if name not in prompts]
    if missing:
        raise ValueError(
            "`evaluation_prompts` must have rows of group 'target' and 'preserved', got none of "
            f"{missing} in {settings.evaluation_prompts}."
        )
    check_base(settings, check_pipeline_class(settings, "eraser"))
    device = chosen_device(settings)
    attacked = attack_groups(settings, prompts["target"], settings.target_concept, device)
    prompts |= {group: texts for group, (texts, _) in attacked.items()}
    seeds |= {group: given for group, (_, given) in attacked.items()}
    judge = _load_clip_judge(settings, device)
    same = ("concept_aspect", "num_videos_per_prompt", "seed", "num_inference_steps", "num_frames", "height", "width")
    pipeline = _load_erased_pipeline(settings, device)
    report = evaluate_erasure(
        pipeline,
        prompts,
        judge,
        scales=settings.scale,
        seeds=seeds,
        guidance_scale=settings.sampling_guidance_scale,
        negative_prompt=settings.negative_prompt or None,
        batch_size=settings.sampling_batch_size,
        kept_clips=settings.kept_clips,
        attacks=make_attacks(settings, settings.seed),
        first_frames=read_frames(settings, pipeline),
        show_progress=show_progress,
        **{name: getattr(settings, name) for name in same},
    )
    name_subject(report, settings, "pretrained_model_name_or_path", "revision", "eraser", "evaluation_prompts")
    if settings.attacks:
        report.settings["paraphrases"] = prompts.get("attack: paraphrase", [])
        report.settings["not_covered"] = not_covered(settings)
    with staged_output(settings.output_dir) as folder:
        report.save(folder, settings.clip_format, settings.fps)
    return report


def _load_clip_judge(settings: ErasureSettings, device: torch.device) -> ClipJudge:
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
    return CLIPDetector(
        CLIPScoreReward.from_pretrained(settings.judge_model, device=device),
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
ERASURE = Evaluation(ErasureSettings, compare_erasers, "ERASER_RUNS")
EVALUATE_ERASURE = ERASURE.command(
    "evaluate erasure",
    "a model with and without erasers: what is gone, what was kept",
    "Draw clips or pictures of the same prompts from the same seeds with erasers and without, and let a detector say "
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
