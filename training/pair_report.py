"""What came of a pair generation, in one JSON file, and the error where nothing did."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import fmean
from typing import Any

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.text_files import read_json
from diffusers_ext.golden_noise.pair_shards import (
    PairRecord,
    list_shards,
    read_table,
    shard_files,
)


REPORT_NAME = "report.json"


def summarize(folder: str | os.PathLike, this_run: dict[str, Any]) -> dict[str, Any]:
    """Counts, rewards and noise of a set, of kept and of rejected pairs together and apart.

    Args:
        folder: of the set.
        this_run: what else the report says.
    """
    shards = [shard_files(folder, shard) for shard in list_shards(folder)]
    kept = [record for files in shards for record in read_table(files.pairs)]
    rejected = [record for files in shards for record in read_table(files.rejected)]
    judged = [record for record in (*kept, *rejected) if record.reward_golden is not None]
    report: dict[str, Any] = {
        "tried": len(kept) + len(rejected),
        "kept": len(kept),
        "rejected": len(rejected),
        "noise_of_kept": _noise(kept),
        "noise_of_rejected": _noise(rejected),
        "this_run": this_run,
    }
    if judged:
        report["win_rate"] = fmean(gain(record) > 0 for record in judged)
        report["mean_reward_source"] = fmean(record.reward_source for record in judged)
        report["mean_reward_golden"] = fmean(record.reward_golden for record in judged)
        report["highest_gain"] = max(gain(record) for record in judged)
    return report


def write_report(folder: str | os.PathLike, report: dict[str, Any]) -> None:
    """Write `report.json`."""
    write_atomically(Path(folder, REPORT_NAME), json.dumps(report, indent=2) + "\n")


def check_report(folder: str | os.PathLike) -> None:
    """Raise `ValueError` where a generation has ended without a pair."""
    report = read_json(Path(folder, REPORT_NAME), allow_nan=True)
    if not report["kept"]:
        raise ValueError(
            f"`margin` must let at least one pair pass, got none of {report['tried']}: the highest "
            f"gain is {report['highest_gain']:.4g}. Lower `--margin`, or try more prompts or "
            f"`--noises_per_prompt`. All scores are in {Path(folder, 'rejected')}."
        )


def gain(record: PairRecord) -> float:
    """By how much golden noise raised the reward."""
    return record.reward_golden - record.reward_source


def _noise(records: list[PairRecord]) -> dict[str, float]:
    names = ("mean", "std", "kurtosis", "lag1_correlation")
    return {name: fmean(getattr(record, name) for record in records) for name in names if records}
