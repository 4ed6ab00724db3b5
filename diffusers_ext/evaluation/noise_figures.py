"""Collects what is measured on pictures of the same seeds that started from different noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from diffusers_ext.evaluation.features import FeatureExtractor
from diffusers_ext.evaluation.paired_comparison import mean_pairwise_distance
from diffusers_ext.evaluation.paired_figures import extract_features
from diffusers_ext.evaluation.rendering import Shot
from diffusers_ext.evaluation.sheets import KEPT_PER_PROMPT, thumbnail
from diffusers_ext.golden_noise.noise_statistics import noise_statistics, radial_spectrum


STANDARD = "standard"


class KeptPictures(NamedTuple):
    """Pictures of one prompt and seed, kept for the report's sheet."""

    prompt: str
    seed: int
    pictures: dict[str, Image.Image]  # side -> picture
    scores: dict[str, float]  # side -> the first reward's score


class NoiseFigures:
    """Figures of several sides (standard noise first, golden noises), batch by batch.

    Args:
        features: for the distance between pictures of one prompt.
        images_per_prompt: after so many pictures a prompt's features are compared and dropped.
        sheet_prompts: prompts of which two seeds are kept as thumbnails.
    """

    def __init__(
        self,
        sides: Sequence[str],
        features: FeatureExtractor,
        images_per_prompt: int,
        sheet_prompts: int = 16,
    ) -> None:
        self.sides, self.features = list(sides), features
        self.images_per_prompt, self.sheet_prompts = images_per_prompt, sheet_prompts
        self.rows: list[dict[str, Any]] = []
        self.kept: list[KeptPictures] = []
        self.distances: dict[str, list[float]] = {side: [] for side in sides}  # one per prompt
        self._power: dict[str, torch.Tensor] = {}
        self._features: dict[str, dict[str, list[torch.Tensor]]] = {}  # prompt -> side -> rows

    def add(
        self,
        shots: Sequence[Shot],
        images: Mapping[str, list[Image.Image]],
        noises: Mapping[str, torch.Tensor],
        scores: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> None:
        """Add one batch by side: pictures, noises `(n, channels, height, width)` on the CPU, scores `(n,)` by reward.

        Sides without pictures may be among the scores.
        """
        columns: dict[str, list[float]] = {
            f"{side}/{label}": values.tolist()
            for side, found in scores.items()
            for label, values in found.items()
        }
        for side, noise in noises.items():
            columns.update(self._measure_noise(side, noise, noises[STANDARD]))
        first = len(self.rows)
        for index, shot in enumerate(shots):
            row = {"prompt": shot.prompt, "index": shot.index, "seed": shot.seed}
            self.rows.append({**row, **{name: column[index] for name, column in columns.items()}})
        self._keep(shots, images, scores)
        if self.images_per_prompt > 1:
            self._compare(self.rows[first:], images)

    def _measure_noise(
        self, side: str, noise: torch.Tensor, standard: torch.Tensor
    ) -> dict[str, list[float]]:
        found = {name: x.tolist() for name, x in noise_statistics(noise)._asdict().items()}
        if side != STANDARD:
            change = (noise - standard).flatten(1).norm(dim=1) / standard.flatten(1).norm(dim=1)
            found["change"] = change.tolist()
        power = radial_spectrum(noise) * len(noise)
        self._power[side] = self._power.get(side, 0) + power
        return {f"{side}/noise_{name}": values for name, values in found.items()}

    def _keep(
        self,
        shots: Sequence[Shot],
        images: Mapping[str, list[Image.Image]],
        scores: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> None:
        for index, shot in enumerate(shots):
            prompts = {kept.prompt for kept in self.kept}
            is_shown = shot.prompt in prompts or len(prompts) < self.sheet_prompts
            if shot.index < KEPT_PER_PROMPT and is_shown:
                pictures = {side: thumbnail(images[side][index]) for side in self.sides}
                first = {
                    side: next(iter(scores[side].values()))[index].item() for side in self.sides
                }
                self.kept.append(KeptPictures(shot.prompt, shot.seed, pictures, first))

    def _compare(
        self, rows: Sequence[dict[str, Any]], images: Mapping[str, list[Image.Image]]
    ) -> None:
        for side in self.sides:
            found = extract_features(self.features, images[side])
            for row, feature in zip(rows, found, strict=True):
                sides = self._features.setdefault(row["prompt"], {})
                sides.setdefault(side, []).append(feature)
        for prompt in [p for p, f in self._features.items() if self._is_complete(f)]:
            for side, found in self._features.pop(prompt).items():
                self.distances[side].append(mean_pairwise_distance(torch.stack(found)))

    def _is_complete(self, found: Mapping[str, list[torch.Tensor]]) -> bool:
        return len(found[STANDARD]) == self.images_per_prompt

    def spectrum(self, side: str) -> list[float | None]:
        """Mean power per ring of spatial frequency; `None` for a ring without a frequency."""
        power = self._power[side] / len(self.rows)
        return [None if torch.isnan(value) else value.item() for value in power]
