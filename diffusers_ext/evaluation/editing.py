"""What an edit of knowledge has changed: pictures from the same seeds with it and without, judged, measured, shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.core.concept_words import concept_pattern, contains_concept
from diffusers_ext.evaluation.features import FeatureExtractor
from diffusers_ext.evaluation.forgetting import (
    PRESERVED,
    SIDES,
    ForgettingReport,
    Judge,
    PairedFigures,
    Scorer,
    measure_pairs,
    one_per_image,
    summarize,
)
from diffusers_ext.evaluation.rendering import Sampling, Shot, check_counts, paired_drawing, shots_of, to_images
from diffusers_ext.evaluation.report_files import SheetRow, sheet_of_sides, spoken
from diffusers_ext.nullspace.edit_prompts import ConceptEdit, anchor_mixture, replaced, split_prompts
from diffusers_ext.nullspace.edit_report import neighbours
from diffusers_ext.nullspace.prompts import check_prompts, unique

TARGET, UNSEEN, OTHERS = "target", "unseen", "unseen_others"  # groups of prompts, with `PRESERVED`
UNSEEN_TEMPLATES = ("a close-up of a {}", "a poster with a {} on it", "here is my {}")
_MOST_OTHERS = 8


@dataclass
class EditingReport(ForgettingReport):
    """Figures of an edited model against its base, as of `ForgettingReport`, by other groups of prompts.

    Those of `"target"` name a target and are what was edited, those of `"unseen"` name one in words that the edit does
    not know; their pictures show the target (`target_read`) or what stands for it (`anchor_read`), the base's and the
    edited model's (`_tuned`). Those of `"preserved"` and `"unseen_others"` name none.
    """

    def _sheet(self) -> Image.Image:
        """One row per prompt: base and edited model side by side, for two seeds."""
        pictures: dict[tuple[str, str], list[Image.Image]] = {}
        for pair in self._kept_pictures():
            pictures.setdefault((pair.group, pair.prompt), []).extend([pair.base, pair.tuned])
        notes = {(row["group"], row["prompt"]): _note(row) for row in self.rows}
        rows = [SheetRow(key[1], notes[key], shown, spoken(key[0])) for key, shown in pictures.items()]
        return sheet_of_sides(rows, ("base", "edited"))


def _note(row: Mapping[str, Any]) -> str:
    """What was said of a prompt's pictures, for the sheet."""
    for name, words in (("target_read", "target read"), ("accuracy", "right")):
        if f"{name}_tuned" in row:
            return f"{words} {row[f'{name}_base']:.2f}, edited {row[f'{name}_tuned']:.2f}"
    return f"pixel drift {row['pixel_drift']:.3f}"


@dataclass
class EditedFigures(PairedFigures):
    """The figures of prompts that name a target: also whether a picture shows it, or what stands for it."""

    edits: Sequence[ConceptEdit] = ()
    target_judge: Judge | None = None

    def add(self, shots: Sequence[Shot], base: torch.Tensor, tuned: torch.Tensor) -> None:
        """Measure pairs of pictures `(n, 3, height, width)` in [0, 1]."""
        super().add(shots, base, tuned)
        if self.target_judge is None:
            return
        prompts = [shot.prompt for shot in shots]
        for side, pixels in zip(SIDES, (base, tuned)):
            images = to_images(pixels)
            found = {"target_read": one_per_image(self.target_judge, images, prompts, "judge", "bool")}
            if all(words for edit in self.edits for words in edit.weights):
                anchors = [anchor_prompts(prompt, self.edits) for prompt in prompts]
                most = max(map(len, anchors))
                readings = [
                    one_per_image(self.target_judge, images, [a[i % len(a)] for a in anchors], "judge", "bool")
                    for i in range(most)
                ]
                found["anchor_read"] = np.max(readings, axis=0).tolist()
            for name, values in found.items():
                for shot, value in zip(shots, values):
                    self._columns[shot.prompt].setdefault(f"{name}_{side}", []).append(value)


def anchor_prompts(prompt: str, edits: Sequence[ConceptEdit]) -> list[str]:
    """What a prompt is read as, all its targets replaced: a prompt for each of an anchor's words, none where empty."""
    return [found for found in anchor_mixture(prompt, edits) if found]


def contrast_judge(scorer: Scorer, edits: Sequence[ConceptEdit]) -> Judge:
    """A judge by scores of pictures with words, such as CLIP's: the prompt must fit better than what stands for it.

    For the empty prompt as anchor it is the prompt without the target's words. A prompt without a target, such as one
    with the anchor, must fit better than those with a target in the anchor's place.
    """

    def rivals(prompt: str) -> list[str]:
        named = [edit for edit in edits if contains_concept(prompt, edit.target)]
        if named:
            without = [" ".join(concept_pattern(edit.target).sub(" ", prompt).split()) for edit in named]
            return anchor_prompts(prompt, named) or without
        return [
            replaced([prompt], words, edit.target)[0]
            for edit in edits
            for words in edit.weights
            if words and contains_concept(prompt, words)
        ]

    def judge(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        own = scorer(images, prompts)
        others = [rivals(prompt) for prompt in prompts]
        best = torch.full_like(own, -torch.inf)
        for index in range(max(map(len, others))):
            rows = [row for row, words in enumerate(others) if index < len(words)]
            scores = scorer([images[row] for row in rows], [others[row][index] for row in rows])
            best[rows] = torch.maximum(best[rows], scores.to(best))
        return own > best

    return judge


def editing_groups(
    edits: Sequence[ConceptEdit], preserve: Sequence[str], unseen_prompts: Sequence[str] = ()
) -> dict[str, list[str]]:
    """The prompts of an evaluation, by group.

    Without `unseen_prompts` they are `UNSEEN_TEMPLATES` with the targets, and with preserved concepts that stand where
    they do.
    """
    found, _ = split_prompts(edits, preserve, False)
    targets = unique([prompt for edit in found for prompt in edit.targets])
    kept = [prompt for prompt in unique(preserve) if prompt not in targets]
    unseen = list(unseen_prompts)
    if unseen:
        check_prompts(unseen, "unseen_prompts")
    else:
        words = unique([one.words for edit in found for one in neighbours(edit, kept)])[:_MOST_OTHERS]
        names = [*(edit.target for edit in edits), *words]
        unseen = [template.format(name) for name in names for template in UNSEEN_TEMPLATES]
    unseen = [prompt for prompt in unique(unseen) if prompt not in targets and prompt not in kept]
    named = [prompt for prompt in unseen if any(contains_concept(prompt, edit.target) for edit in edits)]
    groups = {TARGET: targets, UNSEEN: named, PRESERVED: kept, OTHERS: [p for p in unseen if p not in named]}
    return {group: prompts for group, prompts in groups.items() if prompts}


def evaluate_edit(
    pipeline: DiffusionPipeline,
    edits: Mapping[str, str | Mapping[str, float]] | Sequence[ConceptEdit],
    preserve: Sequence[str],
    *,
    unseen_prompts: Sequence[str] = (),
    judge: Judge | None = None,
    scorer: Scorer | None = None,
    features: FeatureExtractor | None = None,
    max_prompts: int | None = None,
    num_images_per_prompt: int = 4,
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    sheet_prompts: int = 4,
    show_progress: bool = True,
) -> EditingReport:
    """Compare a model with an edit's LoRA with itself without it, picture by picture from the same seeds.

    Args:
        pipeline: with the edit as an active adapter, which is switched off for the base side; left as it was.
        edits: what is edited, with its anchors: `EditedConcepts.edits`.
        preserve: the prompts that the edit was to keep.
        unseen_prompts: prompts in words that the edit does not know, with a target and without; see `editing_groups`.
        judge: `judge(images, prompts)`, one bool per picture: does it show what the prompt says? It is asked for the
            prompts with the target, and for those with the anchor in its place. Without one, `contrast_judge` of the
            scorer where there is one: only for prompts with a target.
        scorer: `scorer(images, prompts)`, one number per picture, e.g. `CLIPFeatures.text_similarity`.
        features: extractor for `feature_drift`.
        max_prompts: of each group, evenly chosen; all when `None`.
        guidance_scale: without it 7.5, or what the pipeline of a flow-matching model has by itself.
        sheet_prompts: prompts per group whose first two pairs the report keeps.

    Raises:
        ValueError: no edit, no anchor, no prompts, or a pipeline without an active adapter.
    """
    edits = ConceptEdit.read(edits)
    missing = [edit.target for edit in edits if edit.anchor is None]
    if missing or not edits:
        raise ValueError(f"`edits` must name what stands for each target, got none for {missing or 'any'}.")
    check_counts(num_images_per_prompt=num_images_per_prompt, batch_size=batch_size, max_prompts=max_prompts)
    groups = editing_groups(edits, preserve, unseen_prompts)
    groups = {group: _evenly(prompts, max_prompts) for group, prompts in groups.items()}
    target_judge = judge or (contrast_judge(scorer, edits) if scorer is not None else None)
    figures: dict[str, PairedFigures] = {}
    for group in groups:
        named = {"edits": edits, "target_judge": target_judge} if group in (TARGET, UNSEEN) else {"judge": judge}
        figures[group] = EditedFigures(group, sheet_prompts, scorer=scorer, features=features, **named)
    sampling = Sampling(num_inference_steps, guidance_scale, negative_prompt, height, width).settled_for(pipeline)
    shots = {group: shots_of(prompts, num_images_per_prompt, seed) for group, prompts in groups.items()}
    with paired_drawing(pipeline, None, sampling) as sides:
        drift_floor, _ = measure_pairs(*sides, shots, figures, None, batch_size, show_progress)
    settings = {
        "base": str(pipeline.config.get("_name_or_path") or ""),
        "edits": {edit.target: edit.told for edit in edits},
        "scheduler": type(pipeline.scheduler).__name__,
        **vars(sampling),
        "num_images_per_prompt": num_images_per_prompt,
        "seed": seed,
        "judged_by": "judge" if judge else "scorer" if scorer else None,
    }
    rows = [row for group in groups for row in figures[group].rows()]
    summary = {group: summarize([row for row in rows if row["group"] == group]) for group in groups}
    return EditingReport(
        settings, drift_floor, rows, summary, {}, [pair for group in groups for pair in figures[group].pairs]
    )


def _evenly(prompts: Sequence[str], most: int | None) -> list[str]:
    """At most so many, from the whole list."""
    if most is None or len(prompts) <= most:
        return list(prompts)
    return [prompts[index] for index in np.linspace(0, len(prompts) - 1, most).round().astype(int)]
