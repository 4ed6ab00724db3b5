"""What `evaluate_golden_noise` found: tables, one row per picture, a picture sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.evaluation.noise_summary import STANDARD, KeptPictures
from diffusers_ext.evaluation.report_files import (
    SavedReport,
    SheetRow,
    markdown_table,
    number_cell,
    sheet_of_sides,
    spoken,
)
from diffusers_ext.families.text_conditioning import TextConditioning
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork
from diffusers_ext.golden_noise.noise_statistics import match_spectrum
from diffusers_ext.golden_noise.redenoise import redenoise_sequence

Refine = Callable[[torch.Tensor, TextConditioning], torch.Tensor]

_PROBES = 16  # weights of a fingerprint; a report is read by people
_RESERVED = ("standard", "best of", "score")  # other rows of the report


class RedenoisedTarget:
    """The re-denoised noise itself, which networks learn to predict; called like a network.

    Its spectrum is matched to the noise it came from, as a network's output is.

    Args:
        pipeline: whose denoiser is asked, twice a repeat.
        repeats: how often the step is repeated.
        num_steps: inference steps of the schedule that sets the strength.
        w1, w2: guidance on the way down and up.
        legacy_inversion: the published off-by-one form.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        repeats: int = 1,
        *,
        num_steps: int = 10,
        w1: float = 5.5,
        w2: float = 1.0,
        legacy_inversion: bool = False,
    ) -> None:
        if repeats < 1:
            raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
        self.pipeline, self.repeats = pipeline, repeats
        self.step = {"num_steps": num_steps, "w1": w1, "w2": w2, "legacy_inversion": legacy_inversion}

    @property
    def facts(self) -> dict[str, Any]:
        """What the evaluation's report says about it."""
        return {"repeats": self.repeats, **self.step}

    def __call__(self, noise: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        """Golden noise of unit `noise` `(batch, channels, height, width)`, float32."""
        sequence = redenoise_sequence(self.pipeline, noise, text, repeats=self.repeats, **self.step)
        return match_spectrum(sequence[:, -1], noise)


class NetworkRefiner:
    """A network called with a `TextConditioning`; `scale` 0 leaves the noise as it is, 1 is its output."""

    def __init__(self, network: GoldenNoiseNetwork, scale: float = 1.0) -> None:
        self.network, self.scale = network, scale

    @property
    def facts(self) -> dict[str, Any]:
        """What the evaluation's report says about it."""
        parameters = list(self.network.parameters())
        return {
            "class": type(self.network).__name__,
            "name_or_path": str(self.network.config.get("_name_or_path") or ""),
            "golden_noise_scale": self.scale,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
            "fingerprint": fingerprint(self.network, _PROBES),
        }

    def __call__(self, noise: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        """Golden noise of unit `noise` `(batch, channels, height, width)`, float32."""
        return self.network.refine(
            noise,
            text.prompt_embeds,
            attention_mask=text.attention_mask,
            pooled_prompt_embeds=text.pooled_prompt_embeds,
            scale=self.scale,
        )


def name_subjects(
    refine: GoldenNoiseNetwork | Refine | Mapping[str, GoldenNoiseNetwork | Refine] | None, scale: float = 1.0
) -> dict[str, Refine]:
    """What is evaluated, by name (one alone is `"golden"`), all called as `refine(noise, text)`."""
    found = refine if isinstance(refine, Mapping) else {"golden": refine}
    if refine is None or not found:
        raise ValueError("`refine` must be a golden-noise network or a function of noise and text, got none.")
    subjects: dict[str, Refine] = {}
    for name, subject in found.items():
        if not name or "/" in name or name.startswith(_RESERVED):
            raise ValueError(
                f"`refine` must have names without '/' that do not start with one of {_RESERVED}, got {name!r}."
            )
        is_network = isinstance(subject, GoldenNoiseNetwork)
        if not is_network and not callable(subject):
            raise TypeError(
                "`refine` must hold golden-noise networks or functions of noise and text, got "
                f"{type(subject).__name__} for {name!r}."
            )
        subjects[name] = NetworkRefiner(subject, scale) if is_network else subject
    return subjects


_MEBIBYTE = 2**20


@dataclass
class GoldenNoiseReport(SavedReport):
    """Figures of golden noise against standard noise from the same seeds.

    Args:
        settings: how the pictures were drawn, by which models, and by what they were judged.
        scores: `{side: {reward: PairedComparison}}` against the standard side; sides are the golden ones and `"best of
            N"`.
        best_of: as of `best_of_summary`; empty where it was left out.
        noise: `{side: {statistic: mean over pictures}}`; `change` is the norm of what was added relative to the noise,
            `spectrum` the power per ring of frequency.
        diversity: `{side: {"distance", "ratio", "ratio_interval"}}`.
        cost: as of `cost_summary`.
        rows: one per picture: prompt, index, seed, `side/reward` and `side/noise_statistic`.
        kept: thumbnails for the sheet; not saved.
    """

    saved: ClassVar[tuple[str, ...]] = (
        "settings", "scores", "best_of", "noise", "diversity", "cost", "rows",
    )  # fmt: skip
    csv_name: ClassVar[str] = "pictures.csv"

    settings: dict[str, Any]
    scores: dict[str, dict[str, dict[str, Any]]]
    best_of: dict[str, Any]
    noise: dict[str, dict[str, Any]]
    diversity: dict[str, dict[str, Any]]
    cost: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    kept: list[KeptPictures] = field(default_factory=list, repr=False, compare=False)

    def to_table(self) -> str:
        """The figures as Markdown tables, with 95 % intervals in brackets."""
        return "\n\n".join(markdown_table(table) for table in self._tables()) + "\n"

    def _tables(self) -> Iterator[list[list[str]]]:
        for label in self.settings["rewards"]:
            yield self._score_table(label)
        if self.best_of:
            yield self._best_of_table()
        names = ["mean", "std", "kurtosis", "lag1_correlation", "change"]
        yield [["noise", *map(spoken, names), "power by frequency"]] + [
            [side, *(number_cell(found.get(name)) for name in names), _numbers(found["spectrum"])]
            for side, found in self.noise.items()
        ]
        if self.diversity:
            yield [["diversity over seeds", "distance", "ratio"]] + [
                [side, number_cell(x["distance"]), number_cell(x["ratio"], x["ratio_interval"])]
                for side, x in self.diversity.items()
            ]
        yield self._cost_table()

    def _score_table(self, label: str) -> list[list[str]]:
        first = next(iter(self.scores.values()))[label]
        return [
            [label, "mean", "difference", "win rate", "ties"],
            [STANDARD, number_cell(first["mean_standard"]), "-", "-", "-"],
        ] + [
            [
                side,
                number_cell(found[label]["mean_other"]),
                number_cell(found[label]["difference"], found[label]["difference_interval"]),
                number_cell(found[label]["win_rate"], found[label]["win_rate_interval"]),
                str(found[label]["ties"]),
            ]
            for side, found in self.scores.items()
        ]

    def _best_of_table(self) -> list[list[str]]:
        count = self.best_of["count"]
        return [
            [f"against best of {count}", "time ratio", "difference", "win rate",
             "best of n at equal time", "n that is as good"]
        ] + [
            [
                subject,
                number_cell(found["time_ratio"]),
                number_cell(found["difference"], found["difference_interval"]),
                number_cell(found["win_rate"], found["win_rate_interval"]),
                f"{number_cell(found['equal_time_mean'])} (n = {found['equal_time_count']})",
                str(found["matching_count"] or f"more than {count}"),
            ]
            for subject, found in self.best_of["against"].items()
        ]  # fmt: skip

    def _cost_table(self) -> list[list[str]]:
        table = [["cost", "s a picture", "s extra", "share extra", "weights MiB", "memory MiB"]]
        for side, found in self.cost.items():
            if side == "score":
                table.append(["scoring", number_cell(found["seconds"]), *["-"] * 4])
                continue
            seconds = [number_cell(found[n]) for n in ("seconds", "extra_seconds", "extra_share")]
            memory = found["peak_memory_bytes"]
            sizes = [found["parameter_bytes"] / _MEBIBYTE, memory and memory / _MEBIBYTE]
            table.append([side, *seconds, *map(number_cell, sizes)])
        if self.best_of:
            name = f"best of {self.best_of['count']}"
            table.append([name, number_cell(self.best_of["seconds"][-1]), *["-"] * 4])
        return table

    def _sheet(self) -> Image.Image:
        """One row per prompt: all sides side by side, for two seeds, with the first reward's scores."""
        by_prompt: dict[str, list[KeptPictures]] = {}
        for kept in self._kept_pictures():
            by_prompt.setdefault(kept.prompt, []).append(kept)
        sides = list(self.kept[0].pictures)
        rows = [
            SheetRow(
                prompt,
                "\n".join(" | ".join(f"{x:.3f}" for x in kept.scores.values()) for kept in found),
                [kept.pictures[side] for kept in found for side in sides],
            )
            for prompt, found in by_prompt.items()
        ]
        return sheet_of_sides(rows, sides)


def _numbers(values: Sequence[float | None]) -> str:
    return " ".join(number_cell(value, form=".2f") for value in values)
