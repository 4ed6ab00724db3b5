"""What is measured on pairs of pictures that a base and a tuned model drew from the same seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_ext.evaluation.features import FeatureExtractor
from diffusers_ext.evaluation.rendering import Shot, to_images
from diffusers_ext.evaluation.report_files import KEPT_PER_PROMPT, thumbnail

_CHUNK = 2_000_000  # draws at once, so that a bootstrap needs little memory


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class PairedComparison(NamedTuple):
    """How `other` does against `standard` on the same pairs; higher scores are better."""

    pairs: int
    mean_standard: float
    mean_other: float
    difference: float  # mean of other - standard
    difference_interval: Interval
    win_rate: float  # share strictly better, ties counted half
    win_rate_interval: Interval
    ties: int


def compare_pairs(
    standard: torch.Tensor,
    other: torch.Tensor,
    *,
    groups: torch.Tensor | None = None,
    confidence: float = 0.95,
    resamples: int = 4000,
) -> PairedComparison:
    """Compare scores `(pairs,)` of the same prompts and seeds.

    The interval of the difference is `bootstrap_interval`'s. Pairs of one of the `groups` (integers) are resampled
    together, and count as many as they are worth (`effective_count`) in Wilson's interval of the win rate.
    """
    standard, other = _check_scores("standard", standard), _check_scores("other", other)
    if standard.shape != other.shape:
        raise ValueError(f"`other` must hold one score per pair ({len(standard)}), got {len(other)}.")
    rate, count = win_rate(standard, other), float(len(standard))
    difference = other - standard
    if groups is not None:
        count = effective_count((difference.sign() + 1) / 2, groups)
    return PairedComparison(
        len(standard),
        standard.mean().item(),
        other.mean().item(),
        difference.mean().item(),
        bootstrap_interval(difference, groups=groups, confidence=confidence, resamples=resamples),
        rate,
        wilson_interval(rate, count, confidence),
        int((difference == 0).sum()),
    )


def win_rate(standard: torch.Tensor, other: torch.Tensor) -> float:
    """Share of pairs `(pairs,)` in which `other` is strictly better; ties count half."""
    return ((other > standard).double() + 0.5 * (other == standard).double()).mean().item()


def effective_count(values: torch.Tensor, groups: torch.Tensor) -> float:
    """How many independent values grouped ones are worth: `n` over the design effect (Kish, 1965).

    Between the number of groups and `n`: variance of the mean if all were independent over that of whole groups, times
    `n`.
    """
    residuals = values.double() - values.double().mean()
    _, row = torch.unique(groups, return_inverse=True)
    number = int(row.max()) + 1
    sums = residuals.new_zeros(number).index_add_(0, row, residuals)
    grouped = sums.square().sum().item()
    if grouped == 0:
        return float(number)
    worth = len(values) * residuals.square().sum().item() / grouped
    return min(max(worth, float(number)), float(len(values)))


def wilson_interval(rate: float, count: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share of `count` (J. Am. Stat. Assoc. 22, 1927); it stays within [0, 1]."""
    if count < 1 or not 0 <= rate <= 1:
        raise ValueError(f"`rate` must be in [0, 1] and `count` at least 1, got {rate} and {count}.")
    z = NormalDist().inv_cdf(0.5 + _check_confidence(confidence) / 2)
    scale = 1 + z * z / count
    centre = (rate + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_interval(
    values: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    groups: torch.Tensor | None = None,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a mean (Efron, Ann. Statist. 7, 1979), deterministic.

    Args:
        values: `(n,)`.
        weights: `(n,)`; the interval is then of `sum(values) / sum(weights)`, a ratio of means.
        groups: `(n,)` integers. Whole groups are resampled, as pictures of one prompt are alike and count for less
            than as many prompts; single values when `None`.
    """
    values = _check_scores("values", values)
    weights = torch.ones_like(values) if weights is None else _check_scores("weights", weights)
    if weights.shape != values.shape or resamples < 1:
        raise ValueError(
            f"`weights` must be {tuple(values.shape)} and `resamples` at least 1, got "
            f"{tuple(weights.shape)} and {resamples}."
        )
    sums = torch.stack([values, weights], dim=1)
    if groups is not None:
        if groups.shape != values.shape:
            raise ValueError(f"`groups` must be {tuple(values.shape)}, got {tuple(groups.shape)}.")
        _, row = torch.unique(groups, return_inverse=True)
        sums = sums.new_zeros(int(row.max()) + 1, 2).index_add_(0, row, sums)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for start in range(0, resamples, max(1, _CHUNK // len(sums))):
        count = min(max(1, _CHUNK // len(sums)), resamples - start)
        drawn = torch.randint(len(sums), (count, len(sums)), generator=generator)
        total = sums[drawn].sum(1)
        means.append(total[:, 0] / total[:, 1])
    tail = (1 - _check_confidence(confidence)) / 2
    ends = torch.quantile(torch.cat(means), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Interval(*ends.tolist())


def expected_best(selection: torch.Tensor, scores: torch.Tensor | None = None) -> torch.Tensor:
    """Mean score of the best of n candidates, for every n up to all of them: `(candidates,)` float64.

    Of N candidates in ascending order, the i-th is the best of n drawn without replacement with probability C(i - 1, n
    - 1) / C(N, n); so all N serve every n. The best has the highest `selection` `(pictures, candidates)`; `scores`,
    `selection` when `None`, say what it is worth.
    """
    if selection.ndim != 2 or not selection.numel() or not torch.isfinite(selection).all():
        raise ValueError(
            "`selection` must be finite (pictures, candidates), got "
            f"{tuple(selection.shape)}{' with NaN' if selection.numel() else ''}."
        )
    scores = selection if scores is None else scores
    if scores.shape != selection.shape:
        raise ValueError(f"`scores` must be {tuple(selection.shape)} like `selection`, got {tuple(scores.shape)}.")
    count = selection.shape[1]
    order = selection.argsort(dim=1, stable=True)
    means = scores.double().gather(1, order).mean(0)
    chances = [[math.comb(i, n - 1) / math.comb(count, n) for i in range(count)] for n in range(1, count + 1)]
    return torch.tensor(chances, dtype=torch.float64) @ means


def mean_pairwise_distance(features: torch.Tensor) -> float:
    """Root mean square difference of two rows of `(n, dim)`, averaged over all pairs of rows."""
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"`features` must be (n, dim) with two rows at least, got {tuple(features.shape)}.")
    distances = torch.pdist(features.double()) / math.sqrt(features.shape[1])
    return distances.mean().item()


def as_lists(found: Mapping[str, Any]) -> dict[str, Any]:
    """Intervals as lists, as JSON gives them back."""
    return {name: list(x) if isinstance(x, tuple) else x for name, x in found.items()}


def group_indices(names: Sequence[str]) -> torch.Tensor:
    """`(n,)` integers, equal where the names are."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.long)


def _check_scores(name: str, scores: torch.Tensor) -> torch.Tensor:
    if scores.ndim != 1 or not len(scores) or not torch.isfinite(scores).all():
        problem = " with NaN or infinite values" if scores.ndim == 1 and len(scores) else ""
        raise ValueError(f"`{name}` must be finite (n,), got {tuple(scores.shape)}{problem}.")
    return scores.double()


def _check_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence}.")
    return confidence


Judge = Callable[[list[Image.Image], list[str]], Sequence[bool] | np.ndarray | torch.Tensor]
Scorer = Callable[[list[Image.Image], list[str]], torch.Tensor]

SIDES = ("base", "tuned")


class KeptPair(NamedTuple):
    """Two pictures of one prompt and one seed, kept for the report's sheet."""

    group: str
    prompt: str
    base: Image.Image
    tuned: Image.Image


@dataclass(frozen=True)
class Instruments:
    """What looks at the pictures of one group; every part is optional, features of the subject are normalised."""

    judge: Judge | None = None
    scorer: Scorer | None = None
    features: FeatureExtractor | None = None
    subject_features: torch.Tensor | None = None


def pixel_drift(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of pictures `(n, 3, height, width)` in [0, 1]; returns `(n,)`."""
    if base.shape != tuned.shape:
        raise ValueError(
            f"`base` and `tuned` must draw pictures of one size, got {tuple(base.shape[1:])} and "
            f"{tuple(tuned.shape[1:])}. Pass `height` and `width`."
        )
    return (base.double() - tuned.double()).abs().flatten(1).mean(1)


def feature_drift(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """`(1 - cos) / 2` of features `(n, dim)`, row by row, as in PEFT's image generation benchmark.

    It is computed as `|u - v|^2 / 4` of the unit vectors, which is exactly 0 for equal rows.
    """
    base, tuned = (F.normalize(x.double(), dim=-1) for x in (base, tuned))
    return (base - tuned).square().sum(-1) / 4


def diversity(features: torch.Tensor) -> float:
    """Mean `(1 - cos) / 2` over all pairs of rows of `(n, dim)`; the scale of `feature_drift`."""
    rows, columns = torch.triu_indices(features.shape[0], features.shape[0], 1)
    return feature_drift(features[rows], features[columns]).mean().item()


class PairedFigures:
    """Collects the figures of one group of prompts, batch by batch; pictures are not kept.

    Of `sheet_prompts` prompts two pairs are kept as thumbnails.
    """

    def __init__(self, group: str, instruments: Instruments, sheet_prompts: int = 16) -> None:
        self.group, self.instruments, self.sheet_prompts = group, instruments, sheet_prompts
        self.pairs: list[KeptPair] = []
        self._columns: dict[str, dict[str, list[float]]] = {}  # prompt -> figure -> per picture
        self._features: dict[str, list[torch.Tensor]] = {side: [] for side in SIDES}
        self._prompts: list[str] = []  # of the pictures, in their order

    def add(self, shots: Sequence[Shot], base: torch.Tensor, tuned: torch.Tensor) -> None:
        """Measure pairs of pictures `(n, 3, height, width)` in [0, 1]."""
        columns = {"pixel_drift": pixel_drift(base, tuned).tolist()}
        images = {"base": to_images(base), "tuned": to_images(tuned)}
        if self.instruments.features is not None:
            features = {side: self.embed(images[side]) for side in SIDES}
            columns["feature_drift"] = feature_drift(features["base"], features["tuned"]).tolist()
            for side in SIDES:
                self._features[side].append(features[side])
                if self.instruments.subject_features is not None:
                    similarity = _cosines(features[side], self.instruments.subject_features)
                    columns[f"subject_similarity_{side}"] = similarity.tolist()
        for side in SIDES:
            columns.update(self._judgements(side, images[side], [shot.prompt for shot in shots]))
        self._prompts += [shot.prompt for shot in shots]
        for row, shot in enumerate(shots):
            figures = self._columns.setdefault(shot.prompt, {})
            for name, values in columns.items():
                figures.setdefault(name, []).append(values[row])
            if shot.index < KEPT_PER_PROMPT and len(self._columns) <= self.sheet_prompts:
                pair = [thumbnail(images[side][row]) for side in SIDES]
                self.pairs.append(KeptPair(self.group, shot.prompt, *pair))

    def embed(self, images: list[Image.Image]) -> torch.Tensor:
        """Features `(n, dim)` of pictures, checked."""
        return extract_features(self.instruments.features, images)

    def _judgements(self, side: str, images: list[Image.Image], prompts: list[str]) -> dict[str, list[float]]:
        found = {}
        if self.instruments.judge is not None:
            verdicts = self.instruments.judge(images, prompts)
            found[f"accuracy_{side}"] = _one_per_image(verdicts, len(images), "judge", "bool")
        if self.instruments.scorer is not None:
            scores = self.instruments.scorer(images, prompts)
            found[f"score_{side}"] = _one_per_image(scores, len(images), "scorer", "number")
        return found

    def all_features(self, side: str) -> torch.Tensor:
        """All features `(n, dim)` of one side, in the order of the pictures."""
        return torch.cat(self._features[side])

    def rows(self) -> list[dict[str, Any]]:
        """One row per prompt: number of pictures and the mean of every figure."""
        rows = []
        for prompt, columns in self._columns.items():
            row: dict[str, Any] = {"group": self.group, "prompt": prompt}
            row["images"] = len(columns["pixel_drift"])
            row.update({name: float(np.mean(values)) for name, values in columns.items()})
            rows.append(row)
        if self.instruments.features is not None:
            for side in SIDES:
                self._add_diversity(rows, side)
        return rows

    def _add_diversity(self, rows: list[dict[str, Any]], side: str) -> None:
        features = self.all_features(side)
        pictures: dict[str, list[int]] = {}
        for index, prompt in enumerate(self._prompts):
            pictures.setdefault(prompt, []).append(index)
        for row in rows:
            if row["images"] > 1:
                row[f"diversity_{side}"] = diversity(features[pictures[row["prompt"]]])


def extract_features(features: FeatureExtractor, images: list[Image.Image]) -> torch.Tensor:
    """Features `(n, dim)`; raises `ValueError` for a wrong shape or values that are not finite."""
    found = features.extract(images)
    if found.ndim != 2 or found.shape[0] != len(images) or not torch.isfinite(found).all():
        raise ValueError(
            f"`features` must give finite features (images, dim) for {len(images)} images, got "
            f"{tuple(found.shape)}{'' if torch.isfinite(found).all() else ' with NaN'}."
        )
    return found


def _cosines(features: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean cosine of each row with all references, `(n,)`; references are L2-normalised."""
    return F.normalize(features.double(), dim=1) @ references.double().mean(0)


def _one_per_image(
    values: Sequence[bool] | np.ndarray | torch.Tensor, count: int, name: str, kind: str
) -> list[float]:
    found = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    right_kind = found.dtype == bool if kind == "bool" else np.issubdtype(found.dtype, np.number)
    if found.shape != (count,) or not right_kind or not np.isfinite(found).all():
        raise ValueError(
            f"`{name}` must give one finite {kind} per image ({count}), got {found.dtype} of shape {found.shape}."
        )
    return found.astype(float).tolist()
