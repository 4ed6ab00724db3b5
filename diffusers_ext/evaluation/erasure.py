"""What erasers take away and what they keep: clips from the same seeds with them and without."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.eraser.outputs import erasers_disabled
from diffusers_ext.evaluation.clip_rendering import render_clips
from diffusers_ext.evaluation.clip_sheet import KeptClip
from diffusers_ext.evaluation.clip_verdicts import ClipJudge, find_concept_aspect, judge_facts
from diffusers_ext.evaluation.eraser_sides import erasers_at_scale, find_erasers, name_scales
from diffusers_ext.evaluation.erasure_report import ErasureReport
from diffusers_ext.evaluation.erasure_rows import (
    ClipShot,
    clip_shots,
    keep_clip,
    list_aspects,
    measure_pairs,
)
from diffusers_ext.evaluation.erasure_summary import BASE


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

    Clips are measured and dropped batch by batch. The pipeline, its erasers and their scales are left as
    they were; LoRAs take part on all sides.

    Args:
        pipeline: a CogVideoX pipeline with erasers (`load_eraser`).
        groups: prompts by group. `"target"` asks for the erased concept and `"preserved"` for all else;
            further ones, such as paraphrases and templates that the training did not see, tell how robust
            the erasure is. A prompt that is listed twice gets twice as many clips.
        judge: `judge(clips, prompts)`, see `clip_verdicts.judged`.
        concept_aspect: the judge's verdict that is about the erased concept.
        adapter_name: erasers to evaluate; all active ones when `None`. Others are off.
        scales: of the erasers, times their own; one erased side each, all against the same base.
        num_videos_per_prompt: clips per entry of a group and side.
        seed: from which all seeds derive.
        seeds: of the entries' first clips, by group; derived where they are `None`.
        num_inference_steps, guidance_scale, negative_prompt, num_frames, height, width: of the pipeline's
            call, with its own defaults where they are `None`.
        batch_size: clips at once.
        base_clips: `(clips, frames, height, width, 3)` uint8 without erasers, drawn before of the same
            groups and settings (`draw_base_clips`), so that several erasers share them.
        kept_clips: of every group, so many are kept for sheet and files.
        show_progress: show a progress bar.
        call: further arguments of the pipeline's call.

    Raises:
        ValueError: prompts, scales or erasers that are missing, clips that are not finite or all blank, or
            a judge that does not say one thing per clip.
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
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    shots = clip_shots(groups, num_videos_per_prompt, seed, seeds)
    if base_clips is not None and len(base_clips) != len(shots):
        raise ValueError(
            f"`base_clips` must hold the {len(shots)} clips of `groups`, got {len(base_clips)}."
        )
    names, sides = find_erasers(pipeline, adapter_name), name_scales(scales, list(groups))
    run = _Run(pipeline, judge, concept_aspect, names, sides, settings, kept_clips)
    run.draw_all(shots, batch_size, base_clips, show_progress)
    if not any(row[f"{side}/drift"] for row in run.rows for side in sides):
        logger.warning("The erasers changed no clip: they have no effect.")
    facts = {
        **_facts(pipeline, names),
        **settings,
        "num_videos_per_prompt": num_videos_per_prompt,
        "seed": seed,
        "scales": sides,
        "batch_size": batch_size,
        "judge": judge_facts(judge),
        "concept_aspect": run.concept_aspect,
    }
    return ErasureReport.from_rows(facts, run.rows, run.kept)


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
    """The `base_clips` of `evaluate_erasure`, which must get the same arguments.

    Returns:
        `(clips, frames, height, width, 3)` uint8, group by group.
    """
    shots = clip_shots(groups, num_videos_per_prompt, seed, seeds)
    with erasers_disabled(pipeline.transformer):
        return _render(pipeline, shots, call, batch_size=batch_size, description="base")


class _Run:
    """The drawing of all sides, batch by batch."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        judge: ClipJudge,
        concept_aspect: str | None,
        names: Sequence[str],
        sides: Mapping[str, float],
        call: dict[str, Any],
        kept_clips: int,
    ) -> None:
        self.pipeline, self.judge, self.names, self.sides = pipeline, judge, names, sides
        self.concept_aspect, self.call, self.kept_clips = concept_aspect, call, kept_clips
        self.rows: list[dict[str, Any]] = []
        self.kept: list[KeptClip] = []
        self.counts: Counter[str] = Counter()

    def draw_all(
        self,
        shots: Sequence[ClipShot],
        batch_size: int,
        base_clips: np.ndarray | None,
        show_progress: bool,
    ) -> None:
        """Draw, judge and measure."""
        with tqdm(total=len(shots), desc="evaluation", disable=not show_progress) as bar:
            for start in range(0, len(shots), batch_size):
                batch = shots[start : start + batch_size]
                base = None if base_clips is None else base_clips[start : start + batch_size]
                self._measure(batch, self._draw(batch, base))
                bar.update(len(batch))

    def _draw(self, shots: Sequence[ClipShot], base: np.ndarray | None) -> dict[str, np.ndarray]:
        if base is None:
            with erasers_disabled(self.pipeline.transformer):
                base = self._render(shots)
        clips = {BASE: base}
        for side, scale in self.sides.items():
            with erasers_at_scale(self.pipeline, self.names, scale):
                clips[side] = self._render(shots)
        return clips

    def _render(self, shots: Sequence[ClipShot]) -> np.ndarray:
        return _render(self.pipeline, shots, self.call, batch_size=len(shots), show_progress=False)

    def _measure(self, shots: Sequence[ClipShot], clips: dict[str, np.ndarray]) -> None:
        rows = measure_pairs(shots, clips, self.judge)
        if not self.rows:
            aspects = list_aspects(rows)
            self.concept_aspect = find_concept_aspect(self.judge, self.concept_aspect, aspects)
        for index, (shot, row) in enumerate(zip(shots, rows, strict=True)):
            if self.counts[shot.group] < self.kept_clips:
                self.counts[shot.group] += 1
                one = {side: drawn[index].copy() for side, drawn in clips.items()}
                self.kept.append(keep_clip(shot, one, row, self.concept_aspect))
        self.rows += rows


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
