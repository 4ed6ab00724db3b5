"""What a fine-tuned text-to-image model still knows and what it has learned: measured, and reported."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from diffusers_ext.evaluation.features import FeatureExtractor, check_images, with_floor
from diffusers_ext.evaluation.paired_comparison import (
    SIDES,
    Instruments,
    Judge,
    KeptPair,
    PairedFigures,
    Scorer,
    extract_features,
    pixel_drift,
)
from diffusers_ext.evaluation.rendering import (
    Draw,
    Sampling,
    Shot,
    adapter_layers,
    check_counts,
    image_seed,
    paired_drawing,
    shots_of,
    to_images,
)
from diffusers_ext.evaluation.report_files import (
    SavedReport,
    SheetRow,
    markdown_table,
    number_cell,
    sheet_of_sides,
    spoken,
)
from diffusers_ext.nullspace.prompts import check_prompts, unique

_NOT_FIGURES = ("group", "prompt", "images")


@dataclass
class ForgettingReport(SavedReport):
    """Figures of a tuned model against its base.

    Args:
        settings: how the pictures were drawn and by what they were measured.
        drift_floor: pixel drift of the base model against itself at the same seeds, over the first batch. It is 0 on
            deterministic kernels; drift below it means nothing.
        rows: one `{"group", "prompt", "images", figure: mean}` per prompt. Figures of one side end in `_base` or
            `_tuned`.
        summary: `{group: {figure: mean over prompts}}` with groups `"preserved"`, `"held_out"` and `"subject"`; also
            the number of prompts and images, and the worst prompt's pixel drift.
        distribution: `{group: {metric: {"tuned": value, "floor": value}}}`, where asked for.
        pairs: thumbnails for the sheet; not saved.
    """

    saved: ClassVar[tuple[str, ...]] = (
        "settings", "drift_floor", "summary", "distribution", "rows",
    )  # fmt: skip
    pictures: ClassVar[str] = "pairs"

    settings: dict[str, Any]
    drift_floor: float
    rows: list[dict[str, Any]]
    summary: dict[str, dict[str, float]]
    distribution: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    pairs: list[KeptPair] = field(default_factory=list, repr=False, compare=False)

    def to_table(self, per_prompt: bool = True) -> str:
        """The figures as Markdown tables: per group, distributions, and per prompt."""
        groups = [{"group": group, **figures} for group, figures in self.summary.items()]
        parts = [_table(groups), f"Base against itself: pixel drift {self.drift_floor:.3g}."]
        distances = [
            {"group": group, "metric": name, "base to tuned": x["tuned"], "floor": x["floor"]}
            for group, metrics in self.distribution.items()
            for name, x in metrics.items()
        ]
        parts += [_table(distances, 2)] if distances else []
        parts += [_table(self.rows, 2)] if per_prompt else []
        return "\n\n".join(parts) + "\n"

    def _sheet(self) -> Image.Image:
        """One row per prompt: base and tuned side by side, for two seeds."""
        pictures: dict[tuple[str, str], list[Image.Image]] = {}
        for pair in self._kept_pictures():
            pictures.setdefault((pair.group, pair.prompt), []).extend([pair.base, pair.tuned])
        drift = {(row["group"], row["prompt"]): row["pixel_drift"] for row in self.rows}
        rows = [
            SheetRow(key[1], f"pixel drift {drift[key]:.3f}", shown, spoken(key[0])) for key, shown in pictures.items()
        ]
        return sheet_of_sides(rows, SIDES)


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the prompts of one group."""
    figures = [name for name in rows[0] if name not in _NOT_FIGURES]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in figures}
    counts = {"prompts": len(rows), "images": sum(row["images"] for row in rows)}
    return {**counts, **means, "worst_pixel_drift": max(row["pixel_drift"] for row in rows)}


def _table(rows: Sequence[dict[str, Any]], left: int = 1) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(name, row.get(name)) for name in names] for row in rows]
    return markdown_table([list(map(spoken, names)), *cells], left)


def _cell(name: str, value: Any) -> str:
    if value is None or isinstance(value, float):
        return number_cell(value)
    return spoken(value) if name in ("group", "metric") else str(value)


logger = logging.getLogger(__name__)

PRESERVED, HELD_OUT, SUBJECT = "preserved", "held_out", "subject"  # groups of prompts
_NEIGHBOURS = 5  # of the coverage figure


def evaluate_forgetting(
    base: DiffusionPipeline,
    tuned: DiffusionPipeline | None,
    prompts: Sequence[str],
    *,
    held_out_prompts: Sequence[str] = (),
    subject_prompts: Sequence[str] = (),
    subject_images: Sequence[Image.Image] | None = None,
    judge: Judge | None = None,
    subject_judge: Judge | None = None,
    scorer: Scorer | None = None,
    features: FeatureExtractor | None = None,
    distribution: bool = False,
    num_images_per_prompt: int = 4,
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    sheet_prompts: int = 16,
    show_progress: bool = True,
) -> ForgettingReport:
    """Compare a tuned model with its base, picture by picture from the same seeds.

    Both models draw every picture from one seed, which depends on the prompt and the picture's number alone, so
    whatever differs is the tuning. Pictures are measured and dropped batch by batch; the pipelines are left as they
    were.

    Args:
        base: the base model. With `tuned=None` the tuned one: its active adapters are switched off for the base side,
            so one pipeline with a LoRA is enough.
        tuned: the tuned model under the same scheduler.
        prompts: the preserved set.
        held_out_prompts: knowledge that the tuning was not told to preserve.
        subject_prompts: prompts of what was learned.
        subject_images: pictures of the real subject. With `features`, `subject_similarity` is the mean cosine to them:
            to rise on subject prompts and to stay on all others.
        judge: `judge(images, prompts)`, one bool per picture: does it show what the prompt says? Asked for preserved
            and held-out prompts.
        subject_judge: the same for subject prompts.
        scorer: `scorer(images, prompts)`, one number per picture, e.g. `CLIPFeatures.text_similarity` or a reward's
            `score`.
        features: extractor for `feature_drift` = (1 - cosine) / 2 and `diversity`, the same between seeds of one
            prompt.
        distribution: also compare distributions of features, next to the distance of two disjoint seed sets of the
            base model, which is drawn once more for that.
        seed: from which all pictures' seeds derive.
        batch_size: pictures at once; the pictures do not depend on it beyond rounding.
        sheet_prompts: prompts per group whose first two pairs the report keeps.

    Raises:
        ValueError: no prompts, a prompt both preserved and held out, a figure without what it needs, pipelines that
            cannot be compared, pictures that are not finite, or a judge that does not give one bool per picture.
    """
    groups = _check_groups(prompts, held_out_prompts, subject_prompts)
    check_counts(num_images_per_prompt=num_images_per_prompt, batch_size=batch_size)
    _check_instruments(groups, features, subject_images, subject_judge)
    if distribution:
        _check_distribution(groups, features, num_images_per_prompt)
    sampling = Sampling(num_inference_steps, guidance_scale, negative_prompt, height, width)
    subject = None
    if subject_images is not None:
        subject = F.normalize(extract_features(features, check_images(subject_images)), dim=1)
    figures = {}
    for group in groups:
        asked = subject_judge if group == SUBJECT else judge
        instruments = Instruments(asked, scorer, features, subject)
        figures[group] = PairedFigures(group, instruments, sheet_prompts)
    layers = adapter_layers(base if tuned is None else tuned)
    settings = {
        "base": str(base.config.get("_name_or_path") or ""),
        "tuned": None if tuned is None else str(tuned.config.get("_name_or_path") or ""),
        "adapters": unique([name for layer in layers for name in layer.active_adapters]),
        "scheduler": type(base.scheduler).__name__,
        **vars(sampling),
        "num_images_per_prompt": num_images_per_prompt,
        "seed": seed,
        "features": None if features is None else type(features).__name__,
    }
    shots = {group: shots_of(groups[group], num_images_per_prompt, seed) for group in groups}
    with paired_drawing(base, tuned, sampling) as sides:
        drift_floor, second = _measure_all(
            *sides, shots, figures, seed if distribution else None, batch_size, show_progress
        )
    rows = [row for group in groups for row in figures[group].rows()]
    if all(row["pixel_drift"] == 0 for row in rows):
        logger.warning("The tuned model drew exactly what the base drew: the tuning has no effect.")
    return ForgettingReport(
        settings,
        drift_floor,
        rows,
        {group: summarize([row for row in rows if row["group"] == group]) for group in groups},
        {group: _distances(figures[group], floor) for group, floor in second.items()},
        [pair for group in groups for pair in figures[group].pairs],
    )


def _measure_all(
    draw_base: Draw,
    draw_tuned: Draw,
    shots: dict[str, list[Shot]],
    figures: dict[str, PairedFigures],
    floor_seed: int | None,
    batch_size: int,
    show_progress: bool,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Draw and measure all pairs.

    Returns the pixel drift of the base model against itself over the first batch, and by group its features of a
    second set of seeds, which derives from `floor_seed`; none without that.
    """
    first: tuple[list[Shot], torch.Tensor] | None = None
    second: dict[str, list[torch.Tensor]] = {}
    total = sum(map(len, shots.values()))
    with tqdm(total=total, desc="evaluation", unit="pair", disable=not show_progress) as bar:
        for group in shots:
            for start in range(0, len(shots[group]), batch_size):
                batch = shots[group][start : start + batch_size]
                drawn = draw_base(batch)
                first = first or (batch, drawn)
                figures[group].add(batch, drawn, draw_tuned(batch))
                if floor_seed is not None and group != SUBJECT:
                    others = [
                        shot._replace(seed=image_seed(floor_seed, shot.prompt, shot.index, "floor")) for shot in batch
                    ]
                    images = to_images(draw_base(others))
                    second.setdefault(group, []).append(figures[group].embed(images))
                bar.update(len(batch))
    drift = pixel_drift(first[1], draw_base(first[0])).mean().item()
    return drift, {group: torch.cat(parts) for group, parts in second.items()}


def _distances(figures: PairedFigures, second: torch.Tensor) -> dict[str, dict[str, float]]:
    base, tuned = figures.all_features("base"), figures.all_features("tuned")
    return with_floor(base, second, tuned, k=_NEIGHBOURS)


def _check_groups(prompts: Sequence[str], held_out: Sequence[str], subject: Sequence[str]) -> dict[str, list[str]]:
    groups = {PRESERVED: unique(check_prompts(prompts))}
    for group, texts in ((HELD_OUT, held_out), (SUBJECT, subject)):
        if len(texts):
            groups[group] = unique(check_prompts(texts, f"{group}_prompts"))
    both = [prompt for prompt in groups.get(HELD_OUT, ()) if prompt in groups[PRESERVED]]
    if both:
        raise ValueError(
            f"`held_out_prompts` must not be among `prompts`, got {both[:3]} in both. Take them "
            "out of one: a preserved prompt is not held out."
        )
    return groups


def _check_instruments(
    groups: dict[str, list[str]],
    features: FeatureExtractor | None,
    subject_images: Sequence[Image.Image] | None,
    subject_judge: Judge | None,
) -> None:
    if subject_judge is not None and SUBJECT not in groups:
        raise ValueError("`subject_prompts` must be given for a `subject_judge`, got none.")
    if subject_images is not None and features is None:
        raise ValueError("`features` must be given to compare with `subject_images`, got None.")


def _check_distribution(groups: dict[str, list[str]], features: FeatureExtractor | None, count: int) -> None:
    if features is None:
        raise ValueError("`features` must be given for `distribution=True`, got None.")
    for group, prompts in groups.items():
        if group != SUBJECT and len(prompts) * count <= _NEIGHBOURS:
            raise ValueError(
                f"`distribution` must rest on more than {_NEIGHBOURS} pictures per group, got "
                f"{len(prompts) * count} for {group}. Raise `num_images_per_prompt`."
            )
