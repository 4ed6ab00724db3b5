"""Whether golden noise helps, and what it costs: pictures from the same seeds with and without it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.core.quiet_run import quiet_run
from diffusers_ext.evaluation import noise_summary
from diffusers_ext.evaluation.features import FeatureExtractor, PixelFeatures
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.evaluation.golden_noise_run import GoldenNoiseRun, label_rewards
from diffusers_ext.evaluation.golden_noise_subjects import Refine, name_subjects
from diffusers_ext.evaluation.noise_figures import STANDARD, NoiseFigures
from diffusers_ext.evaluation.noise_rendering import latent_shape, without_noise_model
from diffusers_ext.evaluation.rendering import Sampling, Shot, check_counts, shots_of
from diffusers_ext.golden_noise.denoiser import denoiser_of
from diffusers_ext.golden_noise.network import GoldenNoiseNetwork
from diffusers_ext.nullspace.prompts import check_prompts, unique
from diffusers_ext.rewards.reward import Reward


logger = logging.getLogger(__name__)

_PROBES = 16  # weights of a fingerprint; a report is read by people
_FEATURE_SIZE = 64  # pixels a side of the default features


def evaluate_golden_noise(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    refine: GoldenNoiseNetwork | Refine | Mapping[str, GoldenNoiseNetwork | Refine] | None = None,
    rewards: Reward | Sequence[Reward],
    num_images_per_prompt: int = 1,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    golden_noise_scale: float = 1.0,
    best_of: int = 4,
    features: FeatureExtractor | None = None,
    batch_size: int = 8,
    sheet_prompts: int = 16,
    images_dir: str | os.PathLike | None = None,
    show_progress: bool = True,
) -> GoldenNoiseReport:
    """Draw every picture from its seed's noise and from what golden-noise networks make of it.

    All networks and targets share the standard pictures. Time is measured in the same batches, in
    changing order. The text is encoded outside of what is timed for golden noise: a golden-noise
    pipeline uses the embeddings it needs anyway. The pipeline is left as it was.

    Args:
        pipeline: draws; of a golden-noise pipeline its plain form.
        prompts: repetitions are dropped.
        refine: a network, or `refine(unit_noise, text)` with a `TextConditioning` that gives the
            golden noise (as `RedenoisedTarget`); several by name; the pipeline's own `noise_model`
            when `None`. On the pipeline's device.
        rewards: one or several; the first decides what is best, the others are reported.
        seed: from which all pictures' seeds derive.
        seeds: seeds of every prompt's pictures, in place of `seed` and `num_images_per_prompt`.
        golden_noise_scale: of networks.
        best_of: random noises per picture, the standard one among them, of which the first reward
            keeps the best; 1 leaves that comparison out.
        features: for the distance of pictures of one prompt; small pixels when `None`.
        sheet_prompts: prompts of which the report keeps two seeds' pictures.
        images_dir: folder to write every picture to, `<side>/<row of the report>_seed_<seed>.png`.

    Raises:
        ValueError: no prompts, no network, numbers out of range, pictures, noise or scores that
            are not finite, or a network for other latents or text.
        TypeError: a reward or `refine` of another kind.
    """
    check_counts(
        num_images_per_prompt=num_images_per_prompt, best_of=best_of, batch_size=batch_size
    )
    prompts, labelled = unique(check_prompts(prompts)), label_rewards(rewards)
    refine = getattr(pipeline, "noise_model", None) if refine is None else refine
    subjects = name_subjects(refine, golden_noise_scale)
    sampling = Sampling(num_inference_steps, guidance_scale, negative_prompt, height, width)
    shots = _shots(prompts, num_images_per_prompt, seed, seeds)
    shape = latent_shape(pipeline, height, width)
    figures = NoiseFigures(
        [STANDARD, *subjects],
        features or PixelFeatures(_FEATURE_SIZE),
        len(shots) // len(prompts),
        sheet_prompts,
    )
    run = GoldenNoiseRun(
        pipeline, subjects, labelled, sampling, shape, best_of, figures, images_dir
    )
    with quiet_run(pipeline), without_noise_model(pipeline):
        run.draw_all(shots, batch_size, show_progress)
    settings = {
        **_settings(pipeline, sampling, shape),
        "prompts": len(prompts),
        "num_images_per_prompt": len(shots) // len(prompts),
        "seed": seed if seeds is None else None,
        "seeds": None if seeds is None else list(seeds),
        "batch_size": batch_size,
        "best_of": best_of,
        "rewards": list(labelled),
        "features": type(figures.features).__name__,
        "subjects": {name: getattr(subject, "facts", {}) for name, subject in subjects.items()},
    }
    return _report(settings, run, list(labelled))


def _report(settings: dict[str, Any], run: GoldenNoiseRun, labels: list[str]) -> GoldenNoiseReport:
    figures, subjects, count = run.figures, list(run.subjects), run.best_of
    others = [*subjects, noise_summary.best_of_name(count)] if count > 1 else subjects
    best_of = {}
    if count > 1:
        candidates = {label: torch.cat(parts) for label, parts in run.candidates.items()}
        best_of = noise_summary.best_of_summary(figures.rows, candidates, subjects, run.cost)
    grouped = noise_summary.resampled_groups(figures.rows) is not None
    return GoldenNoiseReport(
        {**settings, "resampled": "prompts" if grouped else "pairs"},
        noise_summary.compare_sides(figures.rows, others, labels),
        best_of,
        noise_summary.noise_summary(figures),
        noise_summary.diversity_summary(figures),
        noise_summary.cost_summary(run.cost, figures.sides, settings["subjects"]),
        figures.rows,
        figures.kept,
    )


def _shots(
    prompts: Sequence[str], count: int, seed: int, seeds: Sequence[int] | None
) -> list[Shot]:
    if seeds is None:
        return shots_of(prompts, count, seed)
    if not len(seeds) or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(
            f"`seeds` must be distinct and not negative, one at least, got {list(seeds)[:8]}."
        )
    return [Shot(prompt, index, s) for prompt in prompts for index, s in enumerate(seeds)]


def _settings(
    pipeline: DiffusionPipeline, sampling: Sampling, shape: tuple[int, int, int]
) -> dict[str, Any]:
    denoiser, device = denoiser_of(pipeline), pipeline._execution_device
    is_gpu = device.type == "cuda"
    return {
        "pipeline": type(pipeline).__name__,
        "base": str(pipeline.config.get("_name_or_path") or ""),
        "base_fingerprint": fingerprint(denoiser, _PROBES),
        "scheduler": type(pipeline.scheduler).__name__,
        **vars(sampling),
        "latent_shape": list(shape),
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if is_gpu else device.type,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
