"""GoldenNoiseModel of low bands against the full one on the digits model: quality and operations.

python benchmarks/low_bands_on_digits.py --work_dir outputs/golden_noise
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.golden_noise_on_digits import evaluate, prepare_data, train_all, training_facts
from benchmarks.machine import table, write_results
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel

FULL, BANDED = "GoldenNoiseModel", "GoldenNoiseModel of low bands"
_RESAMPLES = 2000


def operations(network: GoldenNoiseModel, size: int, tokens: int) -> int:
    """Of one `refine` of one noise, matrix products as PyTorch counts them; Fourier transforms are none."""
    config, device = network.config, network.device
    noise = torch.zeros(1, config.in_channels, size, size, device=device)
    text = torch.zeros(1, tokens, config.text_embed_dim, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.refine(noise, text)
    return counter.get_total_flops()


def sdxl_operations(bands: int = 16) -> dict[str, int]:
    """Of the SDXL configuration, full and of low bands, at 1024 x 1024 pixels."""
    networks = {FULL: GoldenNoiseModel(), BANDED: GoldenNoiseModel(bands=bands)}
    return {name: operations(network, 128, 77) for name, network in networks.items()}


def share_of_gain(report: GoldenNoiseReport, reward: str) -> dict[str, Any]:
    """The banded network's mean gain over the full one's; interval by resampled prompts."""
    rows, prompts = report.rows, {}
    for row in rows:
        prompts.setdefault(row["prompt"], []).append(row)
    gains = torch.tensor(
        [
            [sum(row[f"{side}/{reward}"] - row[f"standard/{reward}"] for row in group) for side in (BANDED, FULL)]
            for group in prompts.values()
        ],
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(gains), (_RESAMPLES, len(gains)), generator=generator)
    sums = gains[drawn].sum(1)
    interval = (sums[:, 0] / sums[:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {"share": float(gains[:, 0].sum() / gains[:, 1].sum()), "share_interval": interval.tolist()}


def summary(reports: dict[int, GoldenNoiseReport], flops: dict[str, int]) -> tuple[dict[str, Any], list[list[str]]]:
    """Figures and one row for each network, number of steps and reward."""
    found, rows = {}, []
    for steps, report in reports.items():
        for reward in report.settings["rewards"]:
            share = share_of_gain(report, reward)
            found[f"{steps} steps, {reward}"] = {
                **share, **{side: report.scores[side][reward] for side in (FULL, BANDED)}
            }  # fmt: skip
            for side in (FULL, BANDED):
                score = report.scores[side][reward]
                low, high = share["share_interval"]
                rows.append([
                    side, str(steps), reward, f"{score['mean_standard']:.4f}", f"{score['mean_other']:.4f}",
                    f"{score['win_rate']:.3f}",
                    "1" if side == FULL else f"{share['share']:.3f} [{low:.3f}, {high:.3f}]",
                    f"{report.diversity[side]['ratio']:.3f}",
                    "1" if side == FULL else f"1/{flops[FULL] / flops[BANDED]:.1f}",
                ])  # fmt: skip
    return found, rows


def main(input_args: list[str] | None = None) -> None:
    """Train both on the same pairs, evaluate and write; goes on with what is in `--work_dir`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/golden_noise"))
    parser.add_argument("--noises_per_prompt", type=int, default=20, help="of 200 prompts")
    parser.add_argument("--pictures", type=int, default=10, help="of each of 100 held-out prompts")
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 4])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(input_args)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    data = prepare_data(args.work_dir, args.noises_per_prompt, ["pairs"])
    folders = train_all([FULL, BANDED], data, args.work_dir, args.jobs)
    flops = {name: operations(load_noise_model(folder), 8, 16) for name, folder in folders.items()}
    work = args.work_dir / "low_bands"
    work.mkdir(exist_ok=True)
    reports = {steps: evaluate(folders, steps, args.pictures, work, targets=False) for steps in args.steps}
    figures, rows = summary(reports, flops)
    sdxl = sdxl_operations()
    header = ["network", "steps", "reward", "random noise", "golden noise", "win rate", "share of the gain",
              "diversity", "operations"]  # fmt: skip
    text = table(header, rows)
    text += f"\n\nIn the SDXL configuration, at 1024 x 1024, 16 bands: 1/{sdxl[FULL] / sdxl[BANDED]:.0f}."
    write_results(
        "low_bands_on_digits",
        {"operations": flops, "operations_sdxl": sdxl, "training": training_facts(folders), "figures": figures},
        text,
    )
    print(text)


if __name__ == "__main__":
    main()
