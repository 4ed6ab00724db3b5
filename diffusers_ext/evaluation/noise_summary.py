"""What is measured on pictures of the same seeds from different noise: scores, noise, diversity, cost."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image

from diffusers_ext.evaluation.features import FeatureExtractor, extract_features
from diffusers_ext.evaluation.paired_comparison import (
    as_lists,
    bootstrap_interval,
    compare_pairs,
    expected_best,
    mean_pairwise_distance,
    resampled_groups,
)
from diffusers_ext.evaluation.rendering import Shot
from diffusers_ext.evaluation.report_files import KEPT_PER_PROMPT, thumbnail
from diffusers_ext.golden_noise.noise_statistics import noise_statistics, radial_spectrum

try:
    import resource
except ImportError:  # Windows has no such module; resident memory is then not reported
    resource = None

STANDARD = "standard"


class KeptPictures(NamedTuple):
    """Pictures of one prompt and seed, kept for the report's sheet."""

    prompt: str
    seed: int
    pictures: dict[str, Image.Image]  # side -> picture
    scores: dict[str, float]  # side -> the first reward's score


class NoiseFigures:
    """Figures of several sides (standard noise first, golden noises), batch by batch.

    After `images_per_prompt` pictures a prompt's features are compared and dropped. Of `sheet_prompts` prompts two
    seeds are kept as thumbnails.
    """

    def __init__(
        self, sides: Sequence[str], features: FeatureExtractor, images_per_prompt: int, sheet_prompts: int = 16
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
            f"{side}/{label}": values.tolist() for side, found in scores.items() for label, values in found.items()
        }
        for side, noise in noises.items():
            columns.update(self._measure_noise(side, noise, noises[STANDARD]))
        for index, shot in enumerate(shots):
            row = {"prompt": shot.prompt, "index": shot.index, "seed": shot.seed}
            self.rows.append({**row, **{name: column[index] for name, column in columns.items()}})
            prompts = {kept.prompt for kept in self.kept}
            is_shown = shot.prompt in prompts or len(prompts) < self.sheet_prompts
            if shot.index < KEPT_PER_PROMPT and is_shown:
                pictures = {side: thumbnail(images[side][index]) for side in self.sides}
                first = {side: next(iter(scores[side].values()))[index].item() for side in self.sides}
                self.kept.append(KeptPictures(shot.prompt, shot.seed, pictures, first))
        if self.images_per_prompt > 1:
            self._compare(shots, images)

    def _measure_noise(self, side: str, noise: torch.Tensor, standard: torch.Tensor) -> dict[str, list[float]]:
        found = {name: x.tolist() for name, x in noise_statistics(noise)._asdict().items()}
        if side != STANDARD:
            change = (noise - standard).flatten(1).norm(dim=1) / standard.flatten(1).norm(dim=1)
            found["change"] = change.tolist()
        self._power[side] = self._power.get(side, 0) + radial_spectrum(noise) * len(noise)
        return {f"{side}/noise_{name}": values for name, values in found.items()}

    def _compare(self, shots: Sequence[Shot], images: Mapping[str, list[Image.Image]]) -> None:
        for side in self.sides:
            for shot, feature in zip(shots, extract_features(self.features, images[side]), strict=True):
                self._features.setdefault(shot.prompt, {}).setdefault(side, []).append(feature)
        complete = [p for p, found in self._features.items() if len(found[STANDARD]) == self.images_per_prompt]
        for prompt in complete:
            for side, found in self._features.pop(prompt).items():
                self.distances[side].append(mean_pairwise_distance(torch.stack(found)))

    def spectrum(self, side: str) -> list[float | None]:
        """Mean power per ring of spatial frequency; `None` for a ring without a frequency."""
        power = self._power[side] / len(self.rows)
        return [None if torch.isnan(value) else value.item() for value in power]


class Measurement(NamedTuple):
    """One run of one part."""

    pictures: int
    seconds: float
    memory: int | None  # bytes, see `RunCost.peak_memory`


class RunCost:
    """Collects what the parts of a run cost on a device, which is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.measurements: dict[str, list[Measurement]] = {}

    @contextmanager
    def measure(self, part: str, pictures: int) -> Iterator[None]:
        """Measure the block as one run of `part` over so many pictures."""
        self._synchronize()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        before, start = _peak_resident_bytes(), time.perf_counter()
        yield
        self._synchronize()
        seconds = time.perf_counter() - start
        if on_gpu:
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = None if before is None else _peak_resident_bytes() - before
        self.measurements.setdefault(part, []).append(Measurement(pictures, seconds, memory))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, part: str) -> float:
        """Seconds a picture: the median over full batches.

        The first batch, which warms up, counts only where there is no other full one.
        """
        found = self.measurements[part]
        full = max(measurement.pictures for measurement in found)
        counted = [m for m in found[1:] if m.pictures == full] or found
        return statistics.median(m.seconds / m.pictures for m in counted)

    def peak_memory(self, part: str) -> int | None:
        """On a GPU, the most bytes allocated while the part ran.

        Elsewhere, by how much the part raised the process's largest resident set: 0 where it needs no more than what
        ran before it.
        """
        found = [m.memory for m in self.measurements[part] if m.memory is not None]
        if not found:
            return None
        return max(found) if self.device.type == "cuda" else sum(found)


def _peak_resident_bytes() -> int | None:
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def compare_sides(
    rows: Sequence[dict[str, Any]], sides: Sequence[str], labels: Sequence[str], standard: str = STANDARD
) -> dict[str, dict[str, dict[str, Any]]]:
    """`{side: {reward: PairedComparison as a dict}}` of all `sides` against one."""
    groups = resampled_groups(rows)

    def compare(side: str, label: str) -> dict[str, Any]:
        scores = _column(rows, f"{standard}/{label}"), _column(rows, f"{side}/{label}")
        return as_lists(compare_pairs(*scores, groups=groups)._asdict())

    return {side: {label: compare(side, label) for label in labels} for side in sides}


def best_of_summary(
    rows: Sequence[dict[str, Any]], candidates: Mapping[str, torch.Tensor], subjects: Sequence[str], cost: RunCost
) -> dict[str, Any]:
    """Golden noise against the best of N random noises, at the time that each takes.

    The best of n >= 2 costs n drawings and n scores; one drawing needs no score. Of the `candidates` `{reward:
    (pictures, N)}` the first reward chooses; `cost` has the parts `"draw"`, `"score"` and `"refine X"` for each of the
    golden sides, the `subjects`.

    Returns:
        `count` = N, `seconds` and `expected` (`{reward: [mean of the best of n]}`) for n = 1..N, and by subject in
        `against`: `time_ratio` to the best of N, `difference` to it in the first reward with its interval and the win
        rate, `equal_time_count` (the n that its time pays for) with that `equal_time_mean`, and `matching_count`, the
        smallest n up to N whose mean is as high (`None`: none is).
    """
    primary = next(iter(candidates))
    expected = {label: expected_best(candidates[primary], scores).tolist() for label, scores in candidates.items()}
    count = candidates[primary].shape[1]
    one, score = cost.seconds("draw"), cost.seconds("score")
    seconds = [one if n == 1 else n * (one + score) for n in range(1, count + 1)]
    compared = compare_sides(rows, subjects, [primary], best_of_name(count))
    against = {}
    for subject in subjects:
        found = compared[subject][primary]
        taken = one + cost.seconds(f"refine {subject}")
        paid = max([n for n in range(1, count + 1) if seconds[n - 1] <= taken], default=1)
        enough = [n for n in range(1, count + 1) if expected[primary][n - 1] >= found["mean_other"]]
        against[subject] = {
            "time_ratio": taken / seconds[-1],
            **{name: found[name] for name in ("difference", "difference_interval", "win_rate", "win_rate_interval")},
            "equal_time_count": paid,
            "equal_time_mean": expected[primary][paid - 1],
            "matching_count": min(enough, default=None),
        }
    return {"count": count, "seconds": seconds, "expected": expected, "against": against}


def noise_summary(figures: NoiseFigures) -> dict[str, dict[str, Any]]:
    """`{side: {statistic: mean over pictures}}` with the `spectrum`; see `noise_statistics`."""
    found: dict[str, dict[str, Any]] = {}
    for side in figures.sides:
        prefix = f"{side}/noise_"
        names = [name for name in figures.rows[0] if name.startswith(prefix)]
        means = {n.removeprefix(prefix): _column(figures.rows, n).mean().item() for n in names}
        found[side] = {**means, "spectrum": figures.spectrum(side)}
    return found


def diversity_summary(figures: NoiseFigures) -> dict[str, dict[str, Any]]:
    """`{side: {"distance", "ratio", "ratio_interval"}}`, nothing with one picture a prompt.

    The distance is between pictures of one prompt, averaged over prompts; the ratio is to the standard side, with a
    bootstrap over prompts (`None` where it has no meaning).
    """
    standard = torch.tensor(figures.distances[STANDARD], dtype=torch.float64)
    if not len(standard):
        return {}
    found: dict[str, dict[str, Any]] = {}
    for side in figures.sides:
        distances = torch.tensor(figures.distances[side], dtype=torch.float64)
        found[side] = {"distance": distances.mean().item(), "ratio": None, "ratio_interval": None}
        if standard.min() > 0:
            found[side]["ratio"] = (distances.sum() / standard.sum()).item()
            if len(standard) > 1:
                found[side]["ratio_interval"] = list(bootstrap_interval(distances, standard))
    return found


def cost_summary(
    cost: RunCost, sides: Sequence[str], facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Seconds a picture and memory of every side, and of `"score"`.

    A drawing takes as long from any noise, so those of all sides are one part of `cost`, `"draw"`. `facts` of subjects
    that are networks hold `parameter_bytes`. Memory is as in `RunCost.peak_memory`, of the refinement alone for
    subjects.
    """
    plain = cost.seconds("draw")
    found: dict[str, dict[str, Any]] = {}
    for side in sides:
        part = "draw" if side == STANDARD else f"refine {side}"
        extra = 0.0 if side == STANDARD else cost.seconds(part)
        found[side] = {
            "seconds": plain + extra,
            "extra_seconds": extra,
            "extra_share": extra / plain,
            "parameter_bytes": facts.get(side, {}).get("parameter_bytes", 0),
            "peak_memory_bytes": cost.peak_memory(part),
        }
    return {**found, "score": {"seconds": cost.seconds("score")}}


def best_of_name(count: int) -> str:
    """Name of the side that draws `count` times and keeps the best."""
    return f"best of {count}"


def _column(rows: Sequence[dict[str, Any]], name: str) -> torch.Tensor:
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)
