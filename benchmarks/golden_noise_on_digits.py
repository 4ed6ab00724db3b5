"""Golden noise on the digits model, from pairs to pictures: targets and all networks, 6 and 4 steps.

python benchmarks/golden_noise_on_digits.py --work_dir outputs/golden_noise
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from diffusers_ext.evaluation.golden_noise import RedenoisedTarget, evaluate_golden_noise
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.golden_noise.networks.base import load_noise_model
from examples.digits.check_model import load_pipeline
from examples.digits.golden_noise import GUIDANCE_SCALE, HELD_OUT_PROMPTS, NETWORKS, make_pairs, train_network
from examples.digits.rewards import DigitsReward, SecondDigitsReward

Figures = dict[str, Any]
_TARGETS = {"target of one step": 1, "target of five steps": 5}


def prepare_data(
    folder: Path, noises_per_prompt: int, names: Sequence[str] = ("pairs", "sequences")
) -> dict[str, Path]:
    """Pairs and sequences, made unless they are there."""
    folders = {name: (folder / name, {"pairs": 1, "sequences": 5}[name]) for name in names}
    for path, num_steps in folders.values():
        if not (path / "report.json").is_file():
            make_pairs(path, num_steps=num_steps, noises_per_prompt=noises_per_prompt)
    return {name: path for name, (path, _) in folders.items()}


def train_one(name: str, data: Path, folder: Path, threads: int) -> None:
    """Train one network, unless it is there."""
    torch.set_num_threads(threads)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    if not (folder / "training_report.json").is_file():
        train_network(name, data, folder)


def train_all(names: list[str], data: dict[str, Path], folder: Path, jobs: int) -> dict[str, Path]:
    """All networks, `jobs` at a time; returns their folders."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    folders = {name: folder / name.replace(",", "").replace(" ", "_") for name in names}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(train_one, name, data[NETWORKS[name][1]], folders[name], threads) for name in names]
        for run in tqdm(runs, desc="networks"):
            run.result()
    return folders


def evaluate(
    folders: dict[str, Path], steps: int, pictures: int, work: Path, *, targets: bool = True
) -> GoldenNoiseReport:
    """Networks, and targets and best of four, against the same standard pictures, unless the report is there."""
    path = work / f"report_{steps}_steps.json"
    if path.is_file():
        return GoldenNoiseReport.from_json(path)
    pipeline = load_pipeline()
    repeats = _TARGETS if targets else {}
    subjects: dict[str, Any] = {name: RedenoisedTarget(pipeline, count) for name, count in repeats.items()}
    subjects |= {name: load_noise_model(folder) for name, folder in folders.items()}
    report = evaluate_golden_noise(
        pipeline,
        HELD_OUT_PROMPTS,
        refine=subjects,
        rewards=[DigitsReward(), SecondDigitsReward()],
        num_images_per_prompt=pictures,
        seed=1,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        best_of=4 if targets else 1,
        batch_size=50,
        sheet_prompts=6,
    )
    report.to_csv(work / f"pictures_{steps}_steps.csv")
    report.picture_sheet(work / f"sheet_{steps}_steps.png")
    report.to_json(path)
    return report


def summary_rows(reports: dict[int, GoldenNoiseReport], training: dict[str, Figures]) -> list:
    """One line a noise: for each number of steps probability, win rate, second reward, time."""
    rows = []
    first = next(iter(reports.values()))
    for side in ["standard", *first.scores]:
        row = [side]
        for report in reports.values():
            labels = report.settings["rewards"]
            if side == "standard":
                means = [report.scores[next(iter(report.scores))][x] for x in labels]
                row += [f"{means[0]['mean_standard']:.4f}", "-", f"{means[1]['mean_standard']:.4f}"]
            else:
                found = [report.scores[side][label] for label in labels]
                low, high = found[0]["win_rate_interval"]
                row += [
                    f"{found[0]['mean_other']:.4f}",
                    f"{found[0]['win_rate']:.3f} [{low:.3f}, {high:.3f}]",
                    f"{found[1]['mean_other']:.4f}",
                ]
            against = report.best_of.get("against", {}).get(side)
            row.append("-" if against is None else f"{against['time_ratio']:.2f}")
        noise, diversity = first.noise.get(side, {}), first.diversity.get(side, {})
        for found, key in ((noise, "std"), (noise, "lag1_correlation"), (diversity, "ratio")):
            row.append("-" if found.get(key) is None else f"{found[key]:.3f}")
        known = training.get(side)
        row.append(f"{known['parameters'] / 1e6:.2f} M, {known['seconds']:.0f} s" if known else "-")
        rows.append(row)
    return rows


def training_facts(folders: dict[str, Path]) -> dict[str, Figures]:
    """Size, seconds and validation figures of each network's training."""
    facts = {}
    for name, folder in folders.items():
        report = json.loads((folder / "training_report.json").read_text())
        network = load_noise_model(folder)
        facts[name] = {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "seconds": report["seconds"],
            "validation": report["validation"][-1] if report["validation"] else None,
            "flags": list(NETWORKS[name][3]),
        }
    return facts


def main(input_args: list[str] | None = None) -> None:
    """Make the data, train, evaluate and write the results; goes on with what is in `--work_dir`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/golden_noise"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--noises_per_prompt", type=int, default=20, help="of 200 prompts")
    parser.add_argument("--pictures", type=int, default=10, help="of each of 100 held-out prompts")
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 4])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--name", default="golden_noise_on_digits")
    args = parser.parse_args(input_args)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    data = prepare_data(args.work_dir, args.noises_per_prompt)
    folders = train_all(args.networks, data, args.work_dir, args.jobs)
    training, reports = training_facts(folders), {}
    for steps in args.steps:
        reports[steps] = evaluate(folders, steps, args.pictures, args.work_dir)
    header = ["noise"]
    for steps in reports:
        header += [f"probability, {steps} steps", "win rate", "second reward", "time / best of 4"]
    header += ["std", "lag-1", "diversity", "size, training"]
    text = table(header, summary_rows(reports, training))
    kept = ("settings", "scores", "best_of", "noise", "diversity", "cost")
    results = {str(n): {key: getattr(r, key) for key in kept} for n, r in reports.items()}
    for found in results.values():  # folders of this machine mean nothing to others
        found["settings"] = {**found["settings"], "base": "examples/digits/model"}
        for facts in found["settings"]["subjects"].values():
            facts.pop("name_or_path", None)
    pairs = {name: json.loads((path / "report.json").read_text()) for name, path in data.items()}
    write_results(args.name, {"pairs": pairs, "training": training, "steps": results}, text)
    print(text)


if __name__ == "__main__":
    main()
