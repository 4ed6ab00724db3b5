"""GoldenNoiseModel of low bands against the full one on the digits model: quality and operations.

python benchmarks/low_bands_on_digits.py --work_dir outputs/golden_noise

The full network's figures are those in the results of golden_noise_on_digits.py.
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.golden_noise_on_digits import evaluate, prepare_data, train_all, training_facts
from benchmarks.machine import RESULTS_DIR, table, write_results
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from examples.digits.golden_noise import NETWORKS

FULL, BANDED = "GoldenNoiseModel", "GoldenNoiseModel of low bands"


def operations(network: GoldenNoiseModel, size: int, tokens: int) -> int:
    """Of one `refine` of one noise, matrix products as PyTorch counts them; Fourier transforms are none.

    Attention is computed as products, for those of its fused kernel on a CPU are not counted.
    """
    config, device = network.config, network.device
    noise = torch.zeros(1, config.in_channels, size, size, device=device)
    text = torch.zeros(1, tokens, config.text_embed_dim, device=device)
    products = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), products, FlopCounterMode(display=False) as counter:
        network.refine(noise, text)
    return counter.get_total_flops()


def sdxl_operations(bands: int = 16) -> dict[str, int]:
    """Of the SDXL configuration, full and of low bands, at 1024 x 1024 pixels."""
    networks = {FULL: GoldenNoiseModel(), BANDED: GoldenNoiseModel(bands=bands)}
    return {name: operations(network, 128, 77) for name, network in networks.items()}


def recorded_scores(steps: int) -> dict[str, Any]:
    """The full network's scores by reward, of `golden_noise_on_digits.py`: same pairs, prompts, seeds and steps."""
    results = json.loads((RESULTS_DIR / "golden_noise_on_digits.json").read_text())
    return results["steps"][str(steps)]["scores"][FULL]


def full_operations() -> int:
    """Of the full network at the digits' size, of the same flags."""
    flags = NETWORKS[FULL][3]
    sizes = {
        name: int(flags[flags.index(f"--{name}") + 1]) for name in ("patch_size", "width", "num_layers", "num_heads")
    }
    return operations(GoldenNoiseModel(4, sample_size=8, text_embed_dim=128, **sizes).eval(), 8, 16)


def summary(reports: dict[int, GoldenNoiseReport], ratio: float) -> tuple[dict[str, Any], list[list[str]]]:
    """Figures and one row for each number of steps and reward; the full network's gain is taken as it was measured."""
    found, rows = {}, []
    for steps, report in reports.items():
        for reward, full in recorded_scores(steps).items():
            score = report.scores[BANDED][reward]
            if abs(score["mean_standard"] - full["mean_standard"]) > 2e-3:
                raise ValueError(
                    f"Random noise must be read as when the full network was measured, {full['mean_standard']:.4f}, "
                    f"got {score['mean_standard']:.4f}: run golden_noise_on_digits.py again."
                )
            share, *interval = (x / full["difference"] for x in (score["difference"], *score["difference_interval"]))
            found[f"{steps} steps, {reward}"] = {
                "share": share, "share_interval": interval, FULL: full, BANDED: score,
                "diversity": report.diversity[BANDED],
            }  # fmt: skip
            low, high = interval
            rows.append([
                str(steps), reward, f"{score['mean_standard']:.4f}", f"{full['mean_other']:.4f}",
                f"{score['mean_other']:.4f}", f"{full['win_rate']:.3f} / {score['win_rate']:.3f}",
                f"{share:.3f} [{low:.3f}, {high:.3f}]", f"{report.diversity[BANDED]['ratio']:.3f}", f"1/{ratio:.1f}",
            ])  # fmt: skip
    return found, rows


def main(input_args: list[str] | None = None) -> None:
    """Train, evaluate and write; goes on with what is in `--work_dir`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/golden_noise"))
    parser.add_argument("--noises_per_prompt", type=int, default=20, help="of 200 prompts")
    parser.add_argument("--pictures", type=int, default=10, help="of each of 100 held-out prompts")
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 4])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(input_args)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    data = prepare_data(args.work_dir, args.noises_per_prompt, ["pairs"])
    folders = train_all([BANDED], data, args.work_dir, args.jobs)
    flops = {FULL: full_operations(), BANDED: operations(load_noise_model(folders[BANDED]), 8, 16)}
    work = args.work_dir / "low_bands"
    work.mkdir(exist_ok=True)
    reports = {steps: evaluate(folders, steps, args.pictures, work, targets=False) for steps in args.steps}
    figures, rows = summary(reports, flops[FULL] / flops[BANDED])
    sdxl = sdxl_operations()
    header = ["steps", "reward", "random noise", "full network", "low bands", "win rates", "share of the gain",
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
