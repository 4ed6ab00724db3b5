"""A guard on the digits model: losing pairs it avoids and gain it costs, on held-out prompts and seeds.

python benchmarks/noise_guard_on_digits.py --work_dir outputs/golden_noise
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.golden_noise_on_digits import evaluate, prepare_data, train_all
from benchmarks.machine import table, write_results
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.evaluation.paired_comparison import bootstrap_interval
from diffusers_ext.evaluation.rendering import shots_of, unit_noise
from diffusers_ext.golden_noise.first_prediction import first_prediction
from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.networks.guard import choose_threshold
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from diffusers_ext.golden_noise.pairs.shards import judged_pairs
from diffusers_ext.golden_noise.redenoise import encode_prompts
from diffusers_ext.training.golden_noise.data import split_by_prompt
from diffusers_ext.training.guard import gains_of
from examples.digits.check_model import MODEL_DIR, load_pipeline
from examples.digits.golden_noise import GUIDANCE_SCALE, HELD_OUT_PROMPTS, NETWORKS, REWARD
from training import train_noise_guard

_READS = ("prediction", "noise")
_RESAMPLES = 2000
_KEPT = (0.98, 0.95, 0.9, 0.8)  # shares of the gain, of the curve
_LOST = (0.05, 0.1)  # that the thresholds allow
_SEED, _SHAPE = 1, (4, 8, 8)  # of `evaluate`


def train_guard(network: Path, work: Path, reads: str, args: argparse.Namespace) -> Path:
    """The network with its guard, unless it is there; guards learn from the same pairs or gains."""
    name, pairs = f"reads_{reads}", learned_from(args)
    line = [
        "--pretrained_model_name_or_path", str(MODEL_DIR), "--noise_model", str(network), "--reads", reads,
        "--max_train_steps", str(args.guard_steps), "--text_batch_size", "100",
    ]  # fmt: skip
    if args.gains_per_prompt:
        name += f"_{args.gains_per_prompt}_gains"
        line += [
            "--prompt_file", str(args.work_dir / "pairs.txt"), "--noises_per_prompt", str(args.gains_per_prompt),
            "--reward", REWARD, "--num_inference_steps", str(args.steps[0]), "--guidance_scale", str(GUIDANCE_SCALE),
            "--batch_size", "100", "--shard_size", "500", "--seed", "2000000",
        ]  # fmt: skip
    if not (work / name / "training_report.json").is_file():
        line += ["--dataset_dir", str(pairs), "--output_dir", str(work / name)]
        train_noise_guard.main(train_noise_guard.parse_args(line))
    return work / name


def learned_from(args: argparse.Namespace) -> Path:
    """Folder of the pairs or gains that guards learn from."""
    return args.work_dir / (f"guard/{args.gains_per_prompt}_gains" if args.gains_per_prompt else "pairs")


def paired_gains(report: GoldenNoiseReport, name: str, reward: str) -> torch.Tensor:
    """Gains of the network without a guard, `(prompts, pictures)`."""
    rows: dict[str, list[float]] = {}
    for row in report.rows:
        rows.setdefault(row["prompt"], []).append(row[f"{name}/{reward}"] - row[f"standard/{reward}"])
    return torch.tensor(list(rows.values()), dtype=torch.float64)


def avoided_share(alone: torch.Tensor, guarded: torch.Tensor) -> tuple[float, list[float]]:
    """`1 - sum(guarded) / sum(alone)` of `(prompts, pictures)`, and its interval by resampled prompts.

    Not a number where there is, or a resample may have, nothing that could be avoided.
    """
    groups = torch.arange(len(alone)).repeat_interleave(alone.shape[1])
    ends = bootstrap_interval(guarded.flatten(), alone.flatten(), groups=groups, resamples=_RESAMPLES)
    return (1 - guarded.sum() / alone.sum()).item(), [1 - ends.high, 1 - ends.low]


def figures(alone: torch.Tensor, changed: torch.Tensor) -> dict[str, Any]:
    """Shares with intervals by resampled prompts, losing pairs, win rates.

    `alone` are gains without a guard and `changed` tells what it lets pass, both `(prompts, pictures)`. A noise that
    it leaves is the seed's to the bit, so that its picture is the plain one and gains nothing.
    """
    guarded = torch.where(changed, alone, 0.0)
    found: dict[str, Any] = {"pairs": alone.numel(), "share_changed": changed.double().mean().item()}
    both = {"gain_lost": (alone, guarded), "losses_avoided": ((alone < 0).double(), (guarded < 0).double())}
    for key, pair in both.items():
        found[key], found[f"{key}_interval"] = avoided_share(*pair)
    flat = torch.stack([alone, guarded], -1).flatten(0, 1)
    wins = (flat[:, 0] > 0).double() + 0.5 * (flat[:, 0] == 0).double()
    return found | {
        "losing": (flat < 0).double().mean(0).tolist(),
        "mean_gain": flat.mean(0).tolist(),
        "win_rate": wins.mean().item(),
        "win_rate_changed": wins[changed.flatten()].mean().item(),
    }


@torch.no_grad()
def expectations(folder: Path, noises: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """What a guard expects of noises and their prompts, `(noises,)`."""
    pipeline, network, found = load_pipeline(), load_noise_model(folder).eval(), []
    guard = network.guard
    network.set_guard(None)
    for noise, rows in zip(noises.split(100), torch.arange(len(prompts)).split(100), strict=True):
        text = encode_prompts(pipeline, [prompts[row] for row in rows])
        golden = network.refine(noise, text.prompt_embeds)
        found.append(guard(guard.inputs(noise, golden, first_prediction(pipeline, text)), text.prompt_embeds))
    return torch.cat(found)


def thresholds(folder: Path, pairs: Path) -> dict[float, float]:
    """By the share of the gain that may be lost, what the training would choose on the pairs that it held out."""
    arguments = json.loads((folder / "training_report.json").read_text())["arguments"]
    records = judged_pairs(pairs)
    split = split_by_prompt([r.prompt for r in records], arguments["validation_split"], arguments["seed"])
    held_out = [records[row] for row in split.validation]
    noises = torch.stack([source_noise(record.seed, _SHAPE) for record in held_out])
    expected = expectations(folder, noises, [record.prompt for record in held_out])
    return {share: choose_threshold(gains_of(held_out), expected, share) for share in _LOST}


def curve(gains: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Losses avoided where the threshold keeps a share of the gain, with the threshold chosen on these very pairs."""
    gains = gains[expected.argsort(descending=True)]
    kept, losing = gains.cumsum(0) / gains.sum(), (gains < 0).double()
    return {
        str(share): 1 - (losing[: int((kept >= share).nonzero()[0]) + 1].sum() / losing.sum()).item()
        for share in _KEPT
    }


def of_the_plain_pictures(report: GoldenNoiseReport, name: str, reward: str) -> dict[str, Any]:
    """How much of the gain those hold that are worst, and the curve of a guard that knew their rewards."""
    plain = torch.tensor([row[f"standard/{reward}"] for row in report.rows], dtype=torch.float64)
    gains = paired_gains(report, name, reward).flatten()
    worst = plain.argsort()[: len(plain) // 10]
    share = (gains[worst].sum() / gains.sum()).item()
    return {"gain_of_worst_tenth": share, "curve_by_plain_reward": curve(gains, -plain)}


def guard_row(steps: int, reads: str, share: str, reward: str, x: dict[str, Any]) -> list[str]:
    """A line of the table."""
    shares = [
        f"{x[key]:.3f} [{x[f'{key}_interval'][0]:.3f}, {x[f'{key}_interval'][1]:.3f}]"
        for key in ("losses_avoided", "gain_lost")
    ]
    return [
        str(steps), reads, share, reward, f"{x['share_changed']:.3f}",
        f"{x['losing'][0]:.3f}", f"{x['losing'][1]:.3f}", *shares,
        f"{x['win_rate']:.3f}", f"{x['win_rate_changed']:.3f}",
    ]  # fmt: skip


def main(input_args: list[str] | None = None) -> None:
    """Train network and guards, evaluate and write; goes on with what is in `--work_dir`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/golden_noise"))
    parser.add_argument("--network", choices=NETWORKS, default="GoldenNoiseModel of low bands")
    parser.add_argument("--noises_per_prompt", type=int, default=20, help="of 200 prompts, for the network")
    parser.add_argument(
        "--gains_per_prompt",
        type=int,
        default=0,
        help="that the network is judged by; 0 takes the rewards of the pairs",
    )
    parser.add_argument("--pictures", type=int, default=10, help="of each of 100 held-out prompts")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 6], help="the network is judged by the first")
    parser.add_argument("--guard_steps", type=int, default=600)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(input_args)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    data = prepare_data(args.work_dir, args.noises_per_prompt, ["pairs"])
    folders = train_all([args.network], data, args.work_dir, args.jobs)
    work = args.work_dir / "guard"
    work.mkdir(exist_ok=True)
    guarded = {reads: train_guard(folders[args.network], work, reads, args) for reads in _READS}
    shots = shots_of(HELD_OUT_PROMPTS, args.pictures, _SEED)
    noises, prompts = unit_noise(shots, _SHAPE), [shot.prompt for shot in shots]
    guesses = {
        reads: (expectations(folder, noises, prompts).view(-1, args.pictures), thresholds(folder, learned_from(args)))
        for reads, folder in guarded.items()
    }
    found, rows = {}, []
    for steps in args.steps:
        report = evaluate(folders, steps, args.pictures, work, targets=False)
        for reward in report.settings["rewards"]:
            found[f"{steps} steps, {reward}"] = of_the_plain_pictures(report, args.network, reward)
        for reads, (expected, chosen) in guesses.items():
            for reward in report.settings["rewards"]:
                gains = paired_gains(report, args.network, reward)
                by_share = {str(share): figures(gains, expected > value) for share, value in chosen.items()}
                rows += [guard_row(steps, reads, share, reward, x) for share, x in by_share.items()]
                found[f"{steps} steps, reads {reads}, {reward}"] = {
                    "by_gain_lost": by_share, "curve": curve(gains.flatten(), expected.flatten())
                }  # fmt: skip
    header = ["steps", "reads", "--gain_lost", "reward", "share changed", "losing pairs", "with guard",
              "losses avoided", "gain lost", "win rate", "win rate among the changed"]  # fmt: skip
    text = table(header, rows)
    kept = ("pairs", "training_pairs", "validation_pairs", "parameters", "validation", "seconds")
    training = {reads: json.loads((folder / "training_report.json").read_text()) for reads, folder in guarded.items()}
    facts = {reads: {name: report[name] for name in kept} for reads, report in training.items()}
    write_results("noise_guard_on_digits", {"network": args.network, "training": facts, "figures": found}, text)
    print(text)


if __name__ == "__main__":
    main()
