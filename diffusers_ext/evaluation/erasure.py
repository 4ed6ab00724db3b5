"""What erasers take away and what they keep: clips from the same seeds with them and without, judged and measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from diffusers_ext.eraser.adapter.layer import EraserLayer
from diffusers_ext.eraser.adapter.outputs import eraser_layers, erasers_disabled
from diffusers_ext.eraser.fit import erased_models
from diffusers_ext.evaluation.clip_figures import clip_drift, degenerate_clips, motion, temporal_smoothness
from diffusers_ext.evaluation.erasure_attacks import NO_ATTACK, Attack
from diffusers_ext.evaluation.erasure_report import ALL, BASE, ErasureReport
from diffusers_ext.evaluation.judges import ClipJudge, find_concept_aspect, judge_facts, judged
from diffusers_ext.evaluation.rendering import check_clip_call, check_counts, image_seed, pipeline_facts, render_clips
from diffusers_ext.evaluation.report_files import KeptClip
from diffusers_ext.nullspace.prompts import check_prompts

logger = logging.getLogger(__name__)

TARGET, PRESERVED = "target", "preserved"


class ClipShot(NamedTuple):
    """One clip to be drawn."""

    group: str
    prompt: str
    index: int  # among the clips of this prompt in its group
    seed: int


def clip_shots(
    groups: Mapping[str, Sequence[str]], count: int, seed: int, seeds: Mapping[str, Sequence[int | None]] | None = None
) -> list[ClipShot]:
    """`count` clips for every entry of every group, the target's first.

    The seed of a clip depends on its prompt and on how often that came before in its group, not on the batch or on
    other prompts; a prompt that is listed twice gets twice as many clips. `seeds` are of the entries' first clips by
    group; where they are `None`, they derive from `seed`.
    """
    check_counts(num_videos_per_prompt=count)
    missing = [name for name in (TARGET, PRESERVED) if not groups.get(name)]
    if missing:
        raise ValueError(f"`groups` must hold prompts of {TARGET!r} and {PRESERVED!r}, got none of {missing}.")
    both = sorted(set(groups[TARGET]) & set(groups[PRESERVED]))
    if both:
        raise ValueError(f"`groups` must not have a prompt in {TARGET!r} and in {PRESERVED!r}, got {both[:3]}.")
    shots: list[ClipShot] = []
    for group, prompts in {TARGET: groups[TARGET], **groups}.items():
        given = (seeds or {}).get(group) or [None] * len(prompts)
        if len(given) != len(prompts):
            raise ValueError(
                f"`seeds` must have one entry per prompt of {group!r} ({len(prompts)}), got {len(given)}."
            )
        seen: dict[str, int] = {}
        for prompt, first in zip(check_prompts(prompts, group), given, strict=True):
            for number in range(count):
                index = seen[prompt] = seen.get(prompt, -1) + 1
                # A given seed stands for its first clip; further clips derive from it.
                derived = image_seed(seed if first is None else first, prompt, index)
                shots.append(ClipShot(group, prompt, index, derived if first is None or number else first))
    return shots


def measure_pairs(
    shots: Sequence[ClipShot], clips: Mapping[str, np.ndarray], judge: ClipJudge
) -> list[dict[str, Any]]:
    """One row per pair of clips `{side: (n, frames, height, width, 3) uint8}`, the base's among them.

    Rows hold `group`, `prompt`, `index`, `seed`, and for every side `side/name` of all that the judge says,
    `side/motion`, `side/temporal_smoothness` but of pictures, `side/degenerate`, and `side/drift` from the base.
    """
    prompts = [shot.prompt for shot in shots]
    columns: dict[str, Sequence[Any]] = {}
    for side, drawn in clips.items():
        columns |= {f"{side}/{name}": values for name, values in judged(judge, drawn, prompts).items()}
        if drawn.shape[1] > 1:  # nothing moves in pictures
            columns[f"{side}/motion"] = motion(drawn).tolist()
            columns[f"{side}/temporal_smoothness"] = temporal_smoothness(drawn).tolist()
        if side != BASE:
            columns[f"{side}/drift"] = clip_drift(clips[BASE], drawn).tolist()
        kinds = degenerate_clips(drawn)
        columns[f"{side}/degenerate"] = [
            " ".join(kind for kind, found in kinds.items() if found[row]) for row in range(len(drawn))
        ]
    return [
        {**shot._asdict(), **{key: values[row] for key, values in columns.items()}} for row, shot in enumerate(shots)
    ]


def list_aspects(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of what the judge gives a verdict on."""
    found = [key for row in rows for key, value in row.items() if isinstance(value, bool)]
    return list(dict.fromkeys(key.removeprefix(f"{BASE}/") for key in found if key.startswith(f"{BASE}/")))


def _note(row: Mapping[str, Any], side: str, concept_aspect: str) -> str:
    """What was said about one side, for the sheet."""
    said = {True: "seen", False: "not seen", None: "not asked for"}[row[f"{side}/{concept_aspect}"]]
    readings = [
        value
        for key, value in row.items()
        if key.startswith(f"{side}/") and isinstance(value, str) and key != f"{side}/degenerate"
    ]
    return "; ".join([f"{concept_aspect} {said}", *readings])


def find_erasers(pipeline: DiffusionPipeline, adapter_name: str | Sequence[str] | None = None) -> list[str]:
    """Names of the erasers to evaluate: the given ones, all active ones when `None`."""
    layers = _layers(pipeline)
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


def _layers(pipeline: DiffusionPipeline) -> list[EraserLayer]:
    """Those with an eraser, of all of a pipeline's denoisers."""
    return [layer for model in erased_models(pipeline).values() for layer in eraser_layers(model).values()]


@contextmanager
def erasers_at_scale(pipeline: DiffusionPipeline, names: Sequence[str], scale: float) -> Iterator[None]:
    """Only the named erasers on, each at its own scale times `scale`; all come back as they were."""
    layers = _layers(pipeline)
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
    attacks: Sequence[Attack] = (),
    first_frames: Sequence[Image.Image] | None = None,
    show_progress: bool = True,
    **further: Any,
) -> ErasureReport:
    """Compare clips with erasers to clips of the same prompts and seeds without them.

    Clips are measured and dropped batch by batch. The pipeline, its erasers and their scales are left as they were;
    LoRAs take part on all sides. Pictures are clips of one frame.

    Args:
        pipeline: of a family that erasers are trained on, with erasers (`load_eraser`).
        groups: prompts by group. `"target"` asks for the erased concept and `"preserved"` for all else; further ones,
            such as paraphrases and templates that the training did not see, tell how robust the erasure is. A prompt
            that is listed twice gets twice as many clips.
        judge: `judge(clips, prompts)`, see `judges.judged`.
        concept_aspect: the judge's verdict that is about the erased concept.
        adapter_name: erasers to evaluate; all active ones when `None`. Others are off.
        scales: of the erasers, times their own; one erased side each, all against the same base.
        num_videos_per_prompt: clips per entry of a group and side.
        seeds: of the entries' first clips, by group; derived from `seed` where they are `None`.
        base_clips: `(clips, frames, height, width, 3)` uint8 without erasers, drawn before of the same groups and
            settings (`draw_base_clips`), so that several erasers share them.
        kept_clips: of every group, so many are kept for sheet and files.
        attacks: under which the target's clips are drawn once more, as groups of their own; at one scale only.
        first_frames: pictures that the clips of an image-to-video model begin with; see `clip_call`.
        further: arguments of the pipeline's call.

    Raises:
        ValueError: prompts, scales or erasers are missing, clips are not finite or all blank, or the model cannot do
            what is asked for.
    """
    settings: dict[str, Any] = {
        "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt, "num_frames": num_frames, "height": height, "width": width, **further,
    }  # fmt: skip
    check_counts(batch_size=batch_size)
    call = {**settings, "first_frames": first_frames}
    check_clip_call(pipeline, call)
    for attack in attacks:
        attack.check(pipeline)
    shots = clip_shots(groups, num_videos_per_prompt, seed, seeds)
    if base_clips is not None and len(base_clips) != len(shots):
        raise ValueError(f"`base_clips` must hold the {len(shots)} clips of `groups`, got {len(base_clips)}.")
    names, sides = find_erasers(pipeline, adapter_name), name_scales(scales, list(groups))
    if attacks and len(sides) > 1:
        raise ValueError(f"`scales` must be one scale where there are `attacks`, got {list(scales)}.")
    for attack in attacks:
        with erasers_at_scale(pipeline, names, scales[0] * attack.scale):
            attack.prepare(pipeline, groups, call)
    found, attacked = (_Measured(judge, kept_clips, concept_aspect) for _ in range(2))
    batches = [shots[start : start + batch_size] for start in range(0, len(shots), batch_size)]
    for batch in tqdm(batches, desc="evaluation", disable=not show_progress):
        base = None if base_clips is None else base_clips[len(found.rows) : len(found.rows) + len(batch)]
        clips = _draw_sides(pipeline, batch, names, sides, call, base)
        found.add(batch, clips)
        targets = [index for index, shot in enumerate(batch) if shot.group == TARGET]
        for attack in attacks if targets else ():
            under = [batch[index]._replace(group=attack.group) for index in targets]
            drawn = _draw_sides(pipeline, under, names, sides, call, clips[BASE][targets], attack)
            attacked.add(under, drawn)
    rows = found.rows + attacked.rows
    if not any(row[f"{side}/drift"] for row in rows for side in sides):
        logger.warning("The erasers changed no clip: they have no effect.")
    facts = {
        **pipeline_facts(pipeline),
        "erasers": names,
        **settings,
        "num_videos_per_prompt": num_videos_per_prompt,
        "seed": seed,
        "scales": sides,
        "batch_size": batch_size,
        "judge": judge_facts(judge),
        "concept_aspect": found.concept_aspect,
    }
    if first_frames is not None:
        facts["num_first_frames"] = len(first_frames)
    if attacks:
        facts["attacks"] = {attack.group: attack.facts() for attack in attacks}
    return ErasureReport.from_rows(facts, rows, found.kept + attacked.kept)


@dataclass
class _Measured:
    """Rows of what was drawn, and the clips that are kept of it."""

    judge: ClipJudge
    kept_clips: int  # of each group
    concept_aspect: str | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    kept: list[KeptClip] = field(default_factory=list)

    def add(self, shots: Sequence[ClipShot], clips: Mapping[str, np.ndarray]) -> None:
        """Measure a batch of clips by side."""
        measured = measure_pairs(shots, clips, self.judge)
        if not self.rows:
            self.concept_aspect = find_concept_aspect(self.judge, self.concept_aspect, list_aspects(measured))
        self.rows += measured
        for index, shot in enumerate(shots):
            if sum(one.group == shot.group for one in self.kept) < self.kept_clips:
                shown = {side: of_side[index].copy() for side, of_side in clips.items()}
                notes = {side: _note(measured[index], side, self.concept_aspect) for side in clips}
                self.kept.append(KeptClip(shot.group, shot.prompt, shot.seed, shown, notes))


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
    check_clip_call(pipeline, call)
    with erasers_disabled(*erased_models(pipeline).values()):
        return _render(pipeline, shots, call, batch_size=batch_size, description="base")


def _draw_sides(
    pipeline: DiffusionPipeline,
    shots: Sequence[ClipShot],
    names: Sequence[str],
    sides: Mapping[str, float],
    call: Mapping[str, Any],
    base: np.ndarray | None,
    attack: Attack = NO_ATTACK,
) -> dict[str, np.ndarray]:
    """Clips of one batch by side, those of the base as given, those with erasers under an attack."""
    drawing = {"batch_size": len(shots), "show_progress": False}
    if base is None:
        with erasers_disabled(*erased_models(pipeline).values()):
            base = _render(pipeline, shots, call, **drawing)
    clips = {BASE: base}
    for side, scale in sides.items():
        erasers = erasers_at_scale(pipeline, names, scale * attack.scale)
        with erasers, attack.active(pipeline, shots, call) as further:
            clips[side] = _render(pipeline, shots, {**call, **further}, **drawing)
    return clips


def _render(
    pipeline: DiffusionPipeline, shots: Sequence[ClipShot], call: Mapping[str, Any], **drawing: Any
) -> np.ndarray:
    prompts, seeds = [shot.prompt for shot in shots], [shot.seed for shot in shots]
    return render_clips(pipeline, prompts, seeds=seeds, **drawing, **call)
