"""What an evaluation of erasers draws, and one row of figures for every pair of clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusers_ext.evaluation import clip_figures
from diffusers_ext.evaluation.clip_verdicts import ClipJudge, judged
from diffusers_ext.evaluation.erasure_summary import BASE
from diffusers_ext.evaluation.rendering import image_seed
from diffusers_ext.evaluation.sheets import KeptClip
from diffusers_ext.nullspace.prompts import check_prompts


TARGET, PRESERVED = "target", "preserved"


class ClipShot(NamedTuple):
    """One clip to be drawn."""

    group: str
    prompt: str
    index: int  # among the clips of this prompt in its group
    seed: int


def clip_shots(
    groups: Mapping[str, Sequence[str]],
    count: int,
    seed: int,
    seeds: Mapping[str, Sequence[int | None]] | None = None,
) -> list[ClipShot]:
    """`count` clips for every entry of every group, the target's first.

    The seed of a clip depends on its prompt and on how often that came before in its group, not on the
    batch or on other prompts; a prompt that is listed twice gets twice as many clips.

    Args:
        groups: prompts by the name of their group; those of the target and the preserved ones differ.
        seed: from which seeds derive.
        seeds: of the entries' first clips, in the order of the prompts; derived where they are `None`.
    """
    if count < 1:
        raise ValueError(f"`num_videos_per_prompt` must be at least 1, got {count}.")
    missing = [name for name in (TARGET, PRESERVED) if not groups.get(name)]
    if missing:
        raise ValueError(
            f"`groups` must hold prompts of {TARGET!r} and {PRESERVED!r}, got none of {missing}."
        )
    both = sorted(set(groups[TARGET]) & set(groups[PRESERVED]))
    if both:
        raise ValueError(
            f"`groups` must not have a prompt in {TARGET!r} and in {PRESERVED!r}, got {both[:3]}."
        )
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
                shots.append(
                    ClipShot(group, prompt, index, derived if first is None or number else first)
                )
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
        columns[f"{side}/motion"] = clip_figures.motion(drawn).tolist()
        columns[f"{side}/temporal_smoothness"] = clip_figures.temporal_smoothness(drawn).tolist()
        if side != BASE:
            columns[f"{side}/drift"] = clip_figures.clip_drift(clips[BASE], drawn).tolist()
        kinds = clip_figures.degenerate_clips(drawn)
        columns[f"{side}/degenerate"] = [
            " ".join(kind for kind, found in kinds.items() if found[row])
            for row in range(len(drawn))
        ]
    return [
        {**shot._asdict(), **{key: values[row] for key, values in columns.items()}}
        for row, shot in enumerate(shots)
    ]


def list_aspects(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of what the judge gives a verdict on."""
    found = (key for row in rows for key, value in row.items() if isinstance(value, bool))
    names = (key.removeprefix(f"{BASE}/") for key in found if key.startswith(f"{BASE}/"))
    return list(dict.fromkeys(names))


def keep_clip(
    shot: ClipShot, clips: dict[str, np.ndarray], row: Mapping[str, Any], concept_aspect: str
) -> KeptClip:
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
