"""What is measured on pairs of pictures that a base and a tuned model drew from the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_ext.evaluation.features import FeatureExtractor
from diffusers_ext.evaluation.rendering import Shot, to_images
from diffusers_ext.evaluation.sheets import KEPT_PER_PROMPT, thumbnail


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

    def _judgements(
        self, side: str, images: list[Image.Image], prompts: list[str]
    ) -> dict[str, list[float]]:
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
    found = (
        values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    )
    right_kind = found.dtype == bool if kind == "bool" else np.issubdtype(found.dtype, np.number)
    if found.shape != (count,) or not right_kind or not np.isfinite(found).all():
        raise ValueError(
            f"`{name}` must give one finite {kind} per image ({count}), got {found.dtype} of shape "
            f"{found.shape}."
        )
    return found.astype(float).tolist()
