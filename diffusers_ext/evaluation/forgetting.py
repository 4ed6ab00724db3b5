"""What a fine-tuned text-to-image model still knows and what it has learned: measured, and reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from diffusers_ext.evaluation.features import (
    FeatureExtractor,
    check_images,
    diversity,
    extract_features,
    feature_drift,
    pixel_drift,
    with_floor,
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
    KEPT_PER_PROMPT,
    SavedReport,
    SheetRow,
    number_cell,
    sheet_of_sides,
    spoken,
    thumbnail,
)
from diffusers_ext.hub import Measured
from diffusers_ext.hub.safe_markdown import markdown_table
from diffusers_ext.nullspace.prompts import check_prompts, unique

logger = logging.getLogger(__name__)

Judge = Callable[[list[Image.Image], list[str]], Sequence[bool] | np.ndarray | torch.Tensor]
Scorer = Callable[[list[Image.Image], list[str]], torch.Tensor]
SIDES = ("base", "tuned")
PRESERVED, HELD_OUT, SUBJECT = "preserved", "held_out", "subject"  # groups of prompts
_NOT_FIGURES = ("group", "prompt", "images")
_COUNTS = ("prompts", "images")
_NEIGHBOURS = 5  # of the coverage figure


class KeptPair(NamedTuple):
    """Two pictures of one prompt and one seed, kept for the report's sheet."""

    group: str
    prompt: str
    base: Image.Image
    tuned: Image.Image


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

    saved: ClassVar[tuple[str, ...]] = ("settings", "drift_floor", "summary", "distribution", "rows")
    pictures: ClassVar[str] = "pairs"

    settings: dict[str, Any]
    drift_floor: float
    rows: list[dict[str, Any]]
    summary: dict[str, dict[str, float]]
    distribution: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    pairs: list[KeptPair] = field(default_factory=list, repr=False, compare=False)

    def measured(self) -> Iterator[Measured]:
        """What a model card shows."""
        for group, figures in self.summary.items():
            notes = f"{figures['prompts']} prompts, {figures['images']} pictures"
            for name, value in figures.items():
                if name not in _COUNTS:
                    yield Measured(spoken(f"{group} prompts"), spoken(name), value, notes=notes)

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


def _table(rows: Sequence[dict[str, Any]], left: int = 1) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(name, row.get(name)) for name in names] for row in rows]
    return markdown_table([list(map(spoken, names)), *cells], left)


def _cell(name: str, value: Any) -> str:
    if value is None or isinstance(value, float):
        return number_cell(value)
    return spoken(value) if name in ("group", "metric") else str(value)


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the prompts of one group."""
    figures = [name for name in rows[0] if name not in _NOT_FIGURES]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in figures}
    counts = {"prompts": len(rows), "images": sum(row["images"] for row in rows)}
    return {**counts, **means, "worst_pixel_drift": max(row["pixel_drift"] for row in rows)}


@dataclass
class PairedFigures:
    """Collects the figures of one group of prompts, batch by batch; pictures are not kept.

    Every instrument is optional; `subject` holds normalised features `(n, dim)` of the real subject. Of
    `sheet_prompts` prompts two pairs are kept as thumbnails.
    """

    group: str
    sheet_prompts: int = 16
    judge: Judge | None = None
    scorer: Scorer | None = None
    features: FeatureExtractor | None = None
    subject: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.pairs: list[KeptPair] = []
        self._columns: dict[str, dict[str, list[float]]] = {}  # prompt -> figure -> per picture
        self._features: dict[str, list[torch.Tensor]] = {side: [] for side in SIDES}
        self._places: dict[str, list[int]] = {}  # prompt -> its pictures' rows of the features

    def add(self, shots: Sequence[Shot], base: torch.Tensor, tuned: torch.Tensor) -> None:
        """Measure pairs of pictures `(n, 3, height, width)` in [0, 1]."""
        columns = {"pixel_drift": pixel_drift(base, tuned).tolist()}
        images = {"base": to_images(base), "tuned": to_images(tuned)}
        prompts = [shot.prompt for shot in shots]
        if self.features is not None:
            features = {side: extract_features(self.features, images[side]) for side in SIDES}
            columns["feature_drift"] = feature_drift(features["base"], features["tuned"]).tolist()
            for side in SIDES:
                self._features[side].append(features[side])
                if self.subject is not None:
                    # The mean cosine of each row with all pictures of the subject.
                    similarity = F.normalize(features[side].double(), dim=1) @ self.subject.double().mean(0)
                    columns[f"subject_similarity_{side}"] = similarity.tolist()
        for side in SIDES:
            if self.judge is not None:
                columns[f"accuracy_{side}"] = one_per_image(self.judge, images[side], prompts, "judge", "bool")
            if self.scorer is not None:
                columns[f"score_{side}"] = one_per_image(self.scorer, images[side], prompts, "scorer", "number")
        first = sum(map(len, self._places.values()))
        for row, shot in enumerate(shots):
            self._places.setdefault(shot.prompt, []).append(first + row)
            figures = self._columns.setdefault(shot.prompt, {})
            for name, values in columns.items():
                figures.setdefault(name, []).append(values[row])
            if shot.index < KEPT_PER_PROMPT and len(self._columns) <= self.sheet_prompts:
                self.pairs.append(KeptPair(self.group, shot.prompt, *(thumbnail(images[side][row]) for side in SIDES)))

    def all_features(self, side: str) -> torch.Tensor:
        """All features `(n, dim)` of one side, in the order of the pictures."""
        return torch.cat(self._features[side])

    def distances(self, floor: torch.Tensor) -> dict[str, dict[str, float]]:
        """Distances of base to tuned, next to those to the base's own features `floor` of other seeds."""
        return with_floor(self.all_features("base"), floor, self.all_features("tuned"), k=_NEIGHBOURS)

    def rows(self) -> list[dict[str, Any]]:
        """One row per prompt: number of pictures and the mean of every figure."""
        rows: list[dict[str, Any]] = [
            {
                "group": self.group,
                "prompt": prompt,
                "images": len(self._places[prompt]),
                **{name: float(np.mean(values)) for name, values in columns.items()},
            }
            for prompt, columns in self._columns.items()
        ]
        if self.features is not None:
            for side in SIDES:
                features = self.all_features(side)
                for row in rows:
                    if row["images"] > 1:
                        row[f"diversity_{side}"] = diversity(features[self._places[row["prompt"]]])
        return rows


def one_per_image(
    instrument: Judge | Scorer, images: list[Image.Image], prompts: list[str], name: str, kind: str
) -> list[float]:
    """Ask an instrument about pictures, and check what it gave."""
    values = instrument(images, prompts)
    found = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    right_kind = found.dtype == bool if kind == "bool" else np.issubdtype(found.dtype, np.number)
    if found.shape != (len(images),) or not right_kind or not np.isfinite(found).all():
        raise ValueError(
            f"`{name}` must give one finite {kind} per image ({len(images)}), got {found.dtype} of shape "
            f"{found.shape}."
        )
    return found.astype(float).tolist()


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
    guidance_scale: float | None = None,
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
            and held-out prompts, `subject_judge` for subject prompts.
        scorer: `scorer(images, prompts)`, one number per picture, e.g. `CLIPFeatures.text_similarity` or a reward's
            `score`.
        features: extractor for `feature_drift` = (1 - cosine) / 2 and `diversity`, the same between seeds of one
            prompt.
        guidance_scale: without it 7.5, or what the pipeline of a flow-matching model has by itself.
        distribution: also compare distributions of features, next to the distance of two disjoint seed sets of the
            base model, which is drawn once more for that.
        batch_size: pictures at once; the pictures do not depend on it beyond rounding.
        sheet_prompts: prompts per group whose first two pairs the report keeps.

    Raises:
        ValueError: prompts are missing or in two groups, pipelines cannot be compared, or pictures are not finite.
    """
    groups = _check_groups(prompts, held_out_prompts, subject_prompts)
    check_counts(num_images_per_prompt=num_images_per_prompt, batch_size=batch_size)
    if subject_judge is not None and SUBJECT not in groups:
        raise ValueError("`subject_prompts` must be given for a `subject_judge`, got none.")
    if subject_images is not None and features is None:
        raise ValueError("`features` must be given to compare with `subject_images`, got None.")
    if distribution:
        _check_distribution(groups, features, num_images_per_prompt)
    sampling = Sampling(num_inference_steps, guidance_scale, negative_prompt, height, width).settled_for(base)
    subject = None
    if subject_images is not None:
        subject = F.normalize(extract_features(features, check_images(subject_images)), dim=1)
    figures = {
        group: PairedFigures(
            group, sheet_prompts, subject_judge if group == SUBJECT else judge, scorer, features, subject
        )
        for group in groups
    }
    settings = {
        "base": str(base.config.get("_name_or_path") or ""),
        "tuned": None if tuned is None else str(tuned.config.get("_name_or_path") or ""),
        "adapters": unique(
            [n for layer in adapter_layers(base if tuned is None else tuned) for n in layer.active_adapters]
        ),
        "scheduler": type(base.scheduler).__name__,
        **vars(sampling),
        "num_images_per_prompt": num_images_per_prompt,
        "seed": seed,
        "features": None if features is None else type(features).__name__,
    }
    shots = {group: shots_of(groups[group], num_images_per_prompt, seed) for group in groups}
    with paired_drawing(base, tuned, sampling) as sides:
        drift_floor, second = measure_pairs(
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
        {group: figures[group].distances(floor) for group, floor in second.items()},
        [pair for group in groups for pair in figures[group].pairs],
    )


def measure_pairs(
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
                    found = extract_features(figures[group].features, to_images(draw_base(others)))
                    second.setdefault(group, []).append(found)
                bar.update(len(batch))
    drift = pixel_drift(first[1], draw_base(first[0])).mean().item()
    return drift, {group: torch.cat(parts) for group, parts in second.items()}


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


def _check_distribution(groups: dict[str, list[str]], features: FeatureExtractor | None, count: int) -> None:
    if features is None:
        raise ValueError("`features` must be given for `distribution=True`, got None.")
    for group, prompts in groups.items():
        if group != SUBJECT and len(prompts) * count <= _NEIGHBOURS:
            raise ValueError(
                f"`distribution` must rest on more than {_NEIGHBOURS} pictures per group, got "
                f"{len(prompts) * count} for {group}. Raise `num_images_per_prompt`."
            )
