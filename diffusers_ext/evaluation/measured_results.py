"""From the JSON report of an evaluation to the figures that a model card shows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers_ext.core.text_files import read_json
from diffusers_ext.evaluation.erasure_report import ErasureReport
from diffusers_ext.evaluation.forgetting import ForgettingReport
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.hub import Measured

_COUNTS = ("prompts", "images")


def measured_results(path: str | os.PathLike) -> list[Measured]:
    """The figures of the report of an evaluation: its JSON file, or the folder with its `report.json`."""
    path = Path(path, "report.json") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"`results` must be the report of an evaluation, got {path}: no such file.")
    content = read_json(path)
    keys = set(content)
    for report, read in _READERS.items():
        if keys == set(report.saved):
            return list(read(content))
    raise ValueError(
        f"{path} must be the report of an evaluation, got {sorted(keys)}. The scripts "
        "`training/evaluate_*.py` write one."
    )


def _forgetting(content: Mapping[str, Any]) -> Iterator[Measured]:
    for group, figures in content["summary"].items():
        notes = f"{figures['prompts']} prompts, {figures['images']} pictures"
        for name, value in figures.items():
            if name not in _COUNTS:
                yield Measured(_words(f"{group} prompts"), _words(name), value, notes=notes)


def _golden_noise(content: Mapping[str, Any]) -> Iterator[Measured]:
    for side, rewards in content["scores"].items():
        for reward, found in rewards.items():
            dataset = f"{found['pairs']} pictures from the same noise"
            for name in ("difference", "win_rate"):
                metric = f"{reward}, {_words(name)} of {side} to standard noise"
                notes = _interval(found[f"{name}_interval"])
                yield Measured(dataset, metric, found[name], notes=notes)


def _erasure(content: Mapping[str, Any]) -> Iterator[Measured]:
    for group, summary in content["groups"].items():
        dataset = f"{group} prompts"
        for side, aspects in summary["rates"].items():
            for aspect, found in aspects.items():
                if not found["pairs"]:
                    continue
                notes = (
                    f"{found['base']:.3g} without the eraser; {found['pairs']} clips; "
                    f"{_interval(found['other_interval'])}"
                )
                metric = f"share of clips that show {aspect}, {side}"
                yield Measured(dataset, metric, found["other"], notes=notes)


_READERS = {ForgettingReport: _forgetting, GoldenNoiseReport: _golden_noise, ErasureReport: _erasure}


def _words(name: str) -> str:
    return name.replace("_", " ")


def _interval(interval: list[float]) -> str:
    return f"95 % interval {interval[0]:.3g} to {interval[1]:.3g}"
