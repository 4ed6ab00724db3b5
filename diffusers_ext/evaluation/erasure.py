"""What erasers take away and what they keep: clips from the same seeds with them and without."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.eraser.adapter.layer import EraserLayer
from diffusers_ext.eraser.adapter.outputs import eraser_layers, erasers_disabled
from diffusers_ext.evaluation.erasure_report import ALL, BASE, ErasureReport
from diffusers_ext.evaluation.erasure_rows import (
    ClipJudge,
    ClipShot,
    clip_shots,
    find_concept_aspect,
    judge_facts,
    keep_clip,
    list_aspects,
    measure_pairs,
)
from diffusers_ext.evaluation.rendering import check_counts, render_clips
from diffusers_ext.evaluation.report_files import KeptClip


def find_erasers(pipeline: DiffusionPipeline, adapter_name: str | Sequence[str] | None = None) -> list[str]:
    """Names of the erasers to evaluate: the given ones, all active ones when `None`."""
    layers = eraser_layers(pipeline.transformer).values()
    loaded = list(dict.fromkeys(name for layer in layers for name in layer.eraser_down))
    active = [layer for layer in layers if not layer.disable_adapters]
    on = dict.fromkeys(name for layer in active for name in layer.active_adapters)
    names = [name for name in loaded if name in on]
    if adapter_name is not None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    unknown = [name for name in names if name not in loaded]
    if unknown or not names:
        raise ValueError(
            f"`adapter_name` must name erasers of the pipeline, {loaded}, got {unknown or names}. Load "
            "one with `load_eraser`, and switch it on."
        )
    return names


@contextmanager
def erasers_at_scale(pipeline: DiffusionPipeline, names: Sequence[str], scale: float) -> Iterator[None]:
    """Only the named erasers on, each at its own scale times `scale`; all come back as they were."""
    layers = list(eraser_layers(pipeline.transformer).values())
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    scaled: list[EraserLayer] = []
    try:
        for layer in layers:
            layer._disable_adapters = False
            layer._active_adapter = [name for name in names if name in layer.eraser_down]
            layer.scale_layer(scale)
            scaled.append(layer)
        yield
    finally:
        for layer in scaled:
            layer.unscale_layer(scale)
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = state


def name_scales(scales: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """`{side: scale}`: `"erased"` for a single scale of 1, else `"scale 0.5"`, ..."""
    if not scales or len(set(scales)) < len(scales) or not all(map(math.isfinite, scales)):
        raise ValueError(f"`scales` must hold different finite numbers, got {list(scales)}.")
    if ALL in groups or "" in groups:
        raise ValueError(f"`groups` must not be named {ALL!r} or be without a name, got {list(groups)}.")
    if list(scales) == [1.0]:
        return {"erased": 1.0}
    return {f"scale {scale:g}": float(scale) for scale in scales}


logger = logging.getLogger(__name__)


def evaluate_erasure(
    pipeline: DiffusionPipeline,
    groups: Mapping[str, Sequence[str]],
    judge: ClipJudge,
    *,
    concept_aspect: str | None = None,
    adapter_name: str | Sequence[str] | None = None,
    scales: Sequence[float] = (1.0,),
    num_videos_per_prompt: int = 1,
    seed: int = 0,
    seeds: Mapping[str, Sequence[int | None]] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    negative_prompt: str | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    base_clips: np.ndarray | None = None,
    kept_clips: int = 4,
    show_progress: bool = True,
    **call: Any,
) -> ErasureReport:
    """Compare clips with erasers to clips of the same prompts and seeds without them.

    Clips are measured and dropped batch by batch. The pipeline, its erasers and their scales are left as they were;
    LoRAs take part on all sides.

    Args:
        pipeline: a CogVideoX pipeline with erasers (`load_eraser`).
        groups: prompts by group. `"target"` asks for the erased concept and `"preserved"` for all else; further ones,
            such as paraphrases and templates that the training did not see, tell how robust the erasure is. A prompt
            that is listed twice gets twice as many clips.
        judge: `judge(clips, prompts)`, see `erasure_rows.judged`.
        concept_aspect: the judge's verdict that is about the erased concept.
        adapter_name: erasers to evaluate; all active ones when `None`. Others are off.
        scales: of the erasers, times their own; one erased side each, all against the same base.
        num_videos_per_prompt: clips per entry of a group and side.
        seed: from which all seeds derive.
        seeds: of the entries' first clips, by group; derived where they are `None`.
        negative_prompt, num_frames, height, width: the pipeline's own defaults where they are `None`.
        base_clips: `(clips, frames, height, width, 3)` uint8 without erasers, drawn before of the same groups and
            settings (`draw_base_clips`), so that several erasers share them.
        kept_clips: of every group, so many are kept for sheet and files.
        call: further arguments of the pipeline's call.

    Raises:
        ValueError: prompts, scales or erasers that are missing, clips that are not finite or all blank, or a judge
            that does not say one thing per clip.
    """
    settings: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        **call,
    }
    check_counts(batch_size=batch_size)
    shots = clip_shots(groups, num_videos_per_prompt, seed, seeds)
    if base_clips is not None and len(base_clips) != len(shots):
        raise ValueError(f"`base_clips` must hold the {len(shots)} clips of `groups`, got {len(base_clips)}.")
    names, sides = find_erasers(pipeline, adapter_name), name_scales(scales, list(groups))
    rows: list[dict[str, Any]] = []
    kept: list[KeptClip] = []
    batches = [shots[start : start + batch_size] for start in range(0, len(shots), batch_size)]
    for batch in tqdm(batches, desc="evaluation", disable=not show_progress):
        base = None if base_clips is None else base_clips[len(rows) : len(rows) + len(batch)]
        clips = _draw_sides(pipeline, batch, names, sides, settings, base)
        measured = measure_pairs(batch, clips, judge)
        if not rows:
            concept_aspect = find_concept_aspect(judge, concept_aspect, list_aspects(measured))
        rows += measured
        for index, shot in enumerate(batch):
            if sum(one.group == shot.group for one in kept) < kept_clips:
                one = {side: of_side[index].copy() for side, of_side in clips.items()}
                kept.append(keep_clip(shot, one, measured[index], concept_aspect))
    if not any(row[f"{side}/drift"] for row in rows for side in sides):
        logger.warning("The erasers changed no clip: they have no effect.")
    facts = {
        **_facts(pipeline, names),
        **settings,
        "num_videos_per_prompt": num_videos_per_prompt,
        "seed": seed,
        "scales": sides,
        "batch_size": batch_size,
        "judge": judge_facts(judge),
        "concept_aspect": concept_aspect,
    }
    return ErasureReport.from_rows(facts, rows, kept)


def draw_base_clips(
    pipeline: DiffusionPipeline,
    groups: Mapping[str, Sequence[str]],
    *,
    num_videos_per_prompt: int = 1,
    seed: int = 0,
    seeds: Mapping[str, Sequence[int | None]] | None = None,
    batch_size: int = 1,
    **call: Any,
) -> np.ndarray:
    """The `base_clips` of `evaluate_erasure`, which must get the same arguments."""
    shots = clip_shots(groups, num_videos_per_prompt, seed, seeds)
    with erasers_disabled(pipeline.transformer):
        return _render(pipeline, shots, call, batch_size=batch_size, description="base")


def _draw_sides(
    pipeline: DiffusionPipeline,
    shots: Sequence[ClipShot],
    names: Sequence[str],
    sides: Mapping[str, float],
    call: Mapping[str, Any],
    base: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Clips of one batch by side, those of the base as given."""
    drawing = {"batch_size": len(shots), "show_progress": False}
    if base is None:
        with erasers_disabled(pipeline.transformer):
            base = _render(pipeline, shots, call, **drawing)
    clips = {BASE: base}
    for side, scale in sides.items():
        with erasers_at_scale(pipeline, names, scale):
            clips[side] = _render(pipeline, shots, call, **drawing)
    return clips


def _render(
    pipeline: DiffusionPipeline, shots: Sequence[ClipShot], call: Mapping[str, Any], **drawing: Any
) -> np.ndarray:
    given = {name: value for name, value in call.items() if value is not None}
    prompts, seeds = [shot.prompt for shot in shots], [shot.seed for shot in shots]
    return render_clips(pipeline, prompts, seeds=seeds, **drawing, **given)


def _facts(pipeline: DiffusionPipeline, names: Sequence[str]) -> dict[str, Any]:
    transformer, device = pipeline.transformer, pipeline._execution_device
    is_gpu = device.type == "cuda"
    return {
        "pipeline": type(pipeline).__name__,
        "base": str(pipeline.config.get("_name_or_path") or ""),
        "scheduler": type(pipeline.scheduler).__name__,
        "erasers": list(names),
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if is_gpu else device.type,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
