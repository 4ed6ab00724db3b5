"""A guard on the digits model: losing pairs it avoids and gain it costs, on held-out prompts and seeds.

python benchmarks/noise_guard_on_digits.py --work_dir outputs/golden_noise
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.golden_noise_on_digits import evaluate, prepare_data, train_all
from benchmarks.machine import table, write_results
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from examples.digits.check_model import MODEL_DIR
from examples.digits.golden_noise import NETWORKS
from training import train_noise_guard

_GUARDED = "with guard"
_RESAMPLES = 2000


def train_guard(network: Path, data: Path, folder: Path, steps: int) -> Path:
    """The network with its guard, unless it is there."""
    if not (folder / "training_report.json").is_file():
        line = [
            "--pretrained_model_name_or_path", str(MODEL_DIR), "--noise_model", str(network),
            "--dataset_dir", str(data), "--output_dir", str(folder), "--max_train_steps", str(steps),
            "--lr_scheduler", "cosine",
        ]  # fmt: skip
        train_noise_guard.main(train_noise_guard.parse_args(line))
    return folder


def paired_gains(report: GoldenNoiseReport, name: str, reward: str) -> torch.Tensor:
    """Gains without and with the guard, `(prompts, pictures, 2)`."""
    rows: dict[str, list[list[float]]] = {}
    for row in report.rows:
        gains = [row[f"{side}/{reward}"] - row[f"standard/{reward}"] for side in (name, _GUARDED)]
        rows.setdefault(row["prompt"], []).append(gains)
    return torch.tensor(list(rows.values()), dtype=torch.float64)


def changed_pictures(report: GoldenNoiseReport) -> torch.Tensor:
    """Whether the guard let the noise be changed, `(pictures,)`."""
    return torch.tensor([row[f"{_GUARDED}/noise_change"] > 0 for row in report.rows])


def guard_shares(gains: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of `(..., pictures, 2)`: share of the gain lost and of the losing pairs avoided, `(...)`."""
    sums, losing = gains.sum(-2), (gains < 0).sum(-2).double()
    return {
        "gain_lost": 1 - sums[..., 1] / sums[..., 0],
        "losses_avoided": 1 - losing[..., 1] / losing[..., 0].clamp(min=1),
    }


def figures(report: GoldenNoiseReport, name: str, reward: str) -> dict[str, Any]:
    """Shares with intervals by resampled prompts, losing pairs, win rates."""
    gains, changed = paired_gains(report, name, reward), changed_pictures(report)
    flat = gains.flatten(0, 1)
    drawn = torch.randint(len(gains), (_RESAMPLES, len(gains)), generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {"pairs": len(flat), "share_changed": changed.double().mean().item()}
    resampled = guard_shares(gains[drawn].flatten(1, 2))
    for key, value in guard_shares(flat).items():
        interval = resampled[key].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        found |= {key: value.item(), f"{key}_interval": interval.tolist()}
    wins = (flat[:, 0] > 0).double() + 0.5 * (flat[:, 0] == 0).double()
    return found | {
        "losing": (flat < 0).double().mean(0).tolist(),
        "mean_gain": flat.mean(0).tolist(),
        "win_rate": wins.mean().item(),
        "win_rate_changed": wins[changed].mean().item(),
    }


def main(input_args: list[str] | None = None) -> None:
    """Train network and guard, evaluate and write; goes on with what is in `--work_dir`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/golden_noise"))
    parser.add_argument("--network", choices=NETWORKS, default="GoldenNoiseModel of low bands")
    parser.add_argument("--noises_per_prompt", type=int, default=20, help="of 200 prompts")
    parser.add_argument("--pictures", type=int, default=10, help="of each of 100 held-out prompts")
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 4])
    parser.add_argument("--guard_steps", type=int, default=600)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(input_args)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    data = prepare_data(args.work_dir, args.noises_per_prompt, ["pairs"])
    folders = train_all([args.network], data, args.work_dir, args.jobs)
    guarded = train_guard(folders[args.network], data["pairs"], args.work_dir / "guarded", args.guard_steps)
    work = args.work_dir / "guard"
    work.mkdir(exist_ok=True)
    found, rows = {}, []
    for steps in args.steps:
        report = evaluate({**folders, _GUARDED: guarded}, steps, args.pictures, work, targets=False)
        for reward in report.settings["rewards"]:
            x = figures(report, args.network, reward)
            found[f"{steps} steps, {reward}"] = x
            shares = [
                f"{x[key]:.3f} [{x[f'{key}_interval'][0]:.3f}, {x[f'{key}_interval'][1]:.3f}]"
                for key in ("losses_avoided", "gain_lost")
            ]
            rows.append([
                str(steps), reward, f"{x['share_changed']:.3f}", f"{x['losing'][0]:.3f}", f"{x['losing'][1]:.3f}",
                *shares, f"{x['win_rate']:.3f}", f"{x['win_rate_changed']:.3f}",
            ])  # fmt: skip
    header = ["steps", "reward", "share changed", "losing pairs", "with guard", "losses avoided", "gain lost",
              "win rate", "win rate among the changed"]  # fmt: skip
    text = table(header, rows)
    training = json.loads((guarded / "training_report.json").read_text())
    kept = ("pairs", "training_pairs", "validation_pairs", "parameters", "validation", "seconds")
    write_results(
        "noise_guard_on_digits",
        {"network": args.network, "training": {name: training[name] for name in kept}, "figures": found},
        text,
    )
    print(text)


if __name__ == "__main__":
    main()
