"""What an evaluation of erasers draws, what a judge says of it, and one row of figures for every pair of clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from diffusers_ext.evaluation.erasure_report import BASE
from diffusers_ext.evaluation.rendering import image_seed
from diffusers_ext.evaluation.report_files import KeptClip
from diffusers_ext.nullspace.prompts import check_prompts

_SMALLEST_MOTION = 0.1 / 255  # mean change a frame below which a clip stands still
_SMALLEST_SPREAD = 2.0 / 255  # standard deviation of a frame below which it shows one flat colour
_LEAST_CORRELATION = 0.1  # of neighbouring pixels, below which a clip is noise


def motion(clips: np.ndarray) -> np.ndarray:
    """Mean absolute change of a pixel from one of two or more frames to the next; `(n,)` in [0, 1]."""
    steps = np.diff(_levels(clips, 2), axis=1)
    return np.abs(steps).mean(axis=(1, 2, 3, 4))


def temporal_smoothness(clips: np.ndarray) -> np.ndarray:
    """How well frames lie between their neighbours, relative to how much happens; `(n,)` in [0, 1].

    `1 - sum |x[t-1] - 2 x[t] + x[t+1]| / sum (|x[t] - x[t-1]| + |x[t+1] - x[t]|)` over all inner frames and all
    windows of a quarter of the shorter side, where `x` is a window's mean: 1 for a clip that fades evenly or stands
    still, 0.6 for a shape that crosses it steadily, about 0.13 for frames that have nothing to do with each other, 0
    for flicker between two pictures. The idea, a frame against what its neighbours say of it, is that of VBench's
    motion smoothness (arXiv 2311.17982) without its interpolation network. The division by the motion keeps a clip
    that hardly moves from being smooth for that reason alone.
    """
    steps = np.diff(_window_means(_levels(clips, 3)), axis=1)
    bends = np.abs(np.diff(steps, axis=1)).sum(axis=(1, 2, 3, 4))
    size = np.abs(steps)
    moved = (size[:, 1:] + size[:, :-1]).sum(axis=(1, 2, 3, 4))
    return np.where(moved > 0, 1 - bends / np.where(moved > 0, moved, 1), 1.0)


def clip_drift(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean absolute difference of the pixels of clips of the same prompts and seeds; `(n,)` in [0, 1]."""
    if base.shape != other.shape:
        raise ValueError(f"`other` must have the shape of `base`, {base.shape}, got {other.shape}.")
    return np.abs(_levels(base) - _levels(other)).mean(axis=(1, 2, 3, 4))


def spatial_correlation(clips: np.ndarray) -> np.ndarray:
    """Correlation of a pixel with its right and lower neighbours: near 1 for pictures, 0 for noise; `(n,)`.

    `1 - mean (x - y)^2 / (2 var)` over both kinds of neighbours and all frames; 1 where all are equal.
    """
    levels = _levels(clips)
    variance = levels.var(axis=(1, 2, 3, 4))
    down = np.square(np.diff(levels, axis=2)).mean(axis=(1, 2, 3, 4))
    right = np.square(np.diff(levels, axis=3)).mean(axis=(1, 2, 3, 4))
    ratio = (down + right) / (4 * np.where(variance > 0, variance, 1))
    return np.where(variance > 0, 1 - ratio, 1.0)


def degenerate_clips(clips: np.ndarray) -> dict[str, np.ndarray]:
    """Which clips are none: a figure may be good for the wrong reason on them.

    `{"blank", "frozen", "noise"}`, each `(n,)` bool: every frame of one flat colour (as black frames of an overflow
    are), nothing moves, or neighbouring pixels that have nothing to do with each other.
    """
    blank = _levels(clips).std(axis=(2, 3)).max(axis=(1, 2)) < _SMALLEST_SPREAD
    noise = ~blank & (spatial_correlation(clips) < _LEAST_CORRELATION)
    return {"blank": blank, "frozen": ~blank & (motion(clips) < _SMALLEST_MOTION), "noise": noise}


def _window_means(levels: np.ndarray) -> np.ndarray:
    """Means of half-overlapping square windows, of a quarter of the shorter side."""
    side = max(1, min(levels.shape[2:4]) // 4)
    frames = torch.from_numpy(levels).flatten(0, 1).permute(0, 3, 1, 2)
    means = F.avg_pool2d(frames, side, stride=max(1, side // 2))
    return means.unflatten(0, levels.shape[:2]).numpy()


def _levels(clips: np.ndarray, fewest_frames: int = 1) -> np.ndarray:
    """Clips as float32 in [0, 1]."""
    if clips.ndim != 5 or clips.shape[-1] != 3 or clips.dtype != np.uint8:
        raise ValueError(f"`clips` must be (n, frames, height, width, 3) of 8 bits, got {clips.shape} {clips.dtype}.")
    if clips.shape[1] < fewest_frames:
        raise ValueError(f"`clips` must have {fewest_frames} frames at least, got {clips.shape[1]}.")
    return clips.astype(np.float32) / 255.0


ClipJudge = Callable[[np.ndarray, list[str]], Mapping[str, np.ndarray]]
# Columns that every evaluation has, which no judge may name.
MEASURED = ("motion", "temporal_smoothness", "drift", "degenerate")
_KINDS = {"b": "bool", "f": "float", "U": "str"}


def judged(judge: ClipJudge, clips: np.ndarray, prompts: Sequence[str]) -> dict[str, list[Any]]:
    """Ask a judge about clips and check what it gave: `{name: one bool, float, str or None per clip}`.

    Args:
        judge: `judge(clips, prompts)` gives a dictionary of arrays `(n,)`: bool for an aspect, whether the clip shows
            what its prompt asks for in it; float for a figure, such as a distance; str for a reading, what is seen
            instead. Masked entries of a `numpy.ma` array say nothing, where a prompt asks for nothing in that aspect.
            An object with a method `correct` is asked by that.
        clips: `(n, frames, height, width, 3)` uint8.
    """
    found = getattr(judge, "correct", judge)(clips, list(prompts))
    if not isinstance(found, Mapping) or not found:
        raise ValueError(
            f"`judge` must give a dictionary of arrays, one value per clip, got {type(found).__name__} {found!r:.80}."
        )
    reserved = sorted(set(found) & set(MEASURED))
    if reserved:
        raise ValueError(f"`judge` must not use the names {list(MEASURED)}, got {reserved}.")
    return {name: _values(name, values, len(clips)) for name, values in found.items()}


def judge_facts(judge: ClipJudge) -> dict[str, Any]:
    """Name, version and further facts of a judge, of a bound method those of its object."""
    owner = getattr(judge, "__self__", judge)
    name = getattr(owner, "name", None) or getattr(owner, "__name__", type(owner).__name__)
    return {"name": str(name), "version": getattr(owner, "version", None), **getattr(owner, "facts", {})}


def find_concept_aspect(judge: ClipJudge, given: str | None, aspects: Sequence[str]) -> str:
    """Which verdict is about the erased concept: `given`, the judge's `concept_aspect`, or its only one."""
    chosen = given or getattr(getattr(judge, "__self__", judge), "concept_aspect", None)
    if chosen is None and len(aspects) == 1:
        return aspects[0]
    if chosen not in aspects:
        raise ValueError(f"`concept_aspect` must be one of the judge's verdicts {list(aspects)}, got {chosen!r}.")
    return chosen


def _values(name: str, values: Any, count: int) -> list[Any]:
    array = np.ma.asarray(values)
    if array.shape != (count,) or array.dtype.kind not in _KINDS:
        raise ValueError(
            f"`judge` must give one bool, float or str per clip ({count}) for {name!r}, got shape "
            f"{array.shape} of {array.dtype}."
        )
    if array.dtype.kind == "f" and not np.isfinite(array.compressed()).all():
        raise ValueError(f"`judge` must give finite figures, got NaN or infinity for {name!r}.")
    return array.tolist()


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
    other prompts; a prompt that is listed twice gets twice as many clips.

    Args:
        groups: prompts by the name of their group; those of the target and the preserved ones differ.
        seed: from which seeds derive.
        seeds: of the entries' first clips, in the order of the prompts; derived where they are `None`.
    """
    if count < 1:
        raise ValueError(f"`num_videos_per_prompt` must be at least 1, got {count}.")
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
    `side/motion`, `side/temporal_smoothness`, `side/degenerate`, and `side/drift` from the base.
    """
    prompts = [shot.prompt for shot in shots]
    columns: dict[str, Sequence[Any]] = {}
    for side, drawn in clips.items():
        for name, values in judged(judge, drawn, prompts).items():
            columns[f"{side}/{name}"] = values
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
    found = (key for row in rows for key, value in row.items() if isinstance(value, bool))
    names = (key.removeprefix(f"{BASE}/") for key in found if key.startswith(f"{BASE}/"))
    return list(dict.fromkeys(names))


def keep_clip(shot: ClipShot, clips: dict[str, np.ndarray], row: Mapping[str, Any], concept_aspect: str) -> KeptClip:
    """Clips `(frames, height, width, 3)` of one shot for a sheet, with what was said about them."""
    notes = {side: _note(row, side, concept_aspect) for side in clips}
    return KeptClip(shot.group, shot.prompt, shot.seed, clips, notes)


def _note(row: Mapping[str, Any], side: str, concept_aspect: str) -> str:
    said = {True: "seen", False: "not seen", None: "not asked for"}[row[f"{side}/{concept_aspect}"]]
    readings = [
        value
        for key, value in row.items()
        if key.startswith(f"{side}/") and isinstance(value, str) and key != f"{side}/degenerate"
    ]
    return "; ".join([f"{concept_aspect} {said}", *readings])
