"""Diversity on the distilled digits: how far pictures of one prompt are apart, and how well they are read.

python benchmarks/diversity_on_digits.py --work_dir outputs/diversity

The dial `diversity` in its ways, and a network that was trained on pairs of `--target diversity`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from diffusers_ext.evaluation.features import PixelFeatures
from diffusers_ext.evaluation.paired_comparison import bootstrap_interval
from diffusers_ext.evaluation.report_files import SheetRow, picture_sheet
from diffusers_ext.golden_noise.diversity import NUM_PROBES, PROMPT_NOISE, WAYS
from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline
from examples.digits.check_model import load_pipeline
from examples.digits.golden_noise import HELD_OUT_PROMPTS
from examples.digits.rewards import DigitsReward, SecondDigitsReward
from examples.digits_distilled.golden_noise import DIVERSE, make_pairs, train_network
from examples.digits_distilled.train_model import MODEL_DIR

_SEED, _AT_ONCE = 5_000_000, 20
_REWARDS, _SPACES = ("reward", "second reward"), ("pixels", "judge's features")
Drawn = dict[str, torch.Tensor]


@cache
def judges() -> tuple[DigitsReward, SecondDigitsReward]:
    """Both rewards, trained once."""
    return DigitsReward(), SecondDigitsReward()


def draw_all(
    pipeline: GoldenNoisePipeline, name: str, steps: int, count: int, sheet: list[SheetRow] | None, **call: Any
) -> Drawn:
    """Mean pairwise distances `(prompts,)` in both spaces and rewards `(prompts, count)` of all held-out prompts."""
    judge, second = judges()
    found: dict[str, list[torch.Tensor]] = {column: [] for column in (*_SPACES, *_REWARDS)}
    for start in tqdm(range(0, len(HELD_OUT_PROMPTS), _AT_ONCE), desc=name):
        prompts = [prompt for prompt in HELD_OUT_PROMPTS[start : start + _AT_ONCE] for _ in range(count)]
        seeds = range(_SEED + start * count, _SEED + start * count + len(prompts))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipeline(prompts, generator=generators, num_inference_steps=steps, guidance_scale=1.0, **call).images
        for space, vectors in zip(_SPACES, (PixelFeatures(64).extract(images), judge.features(images))):
            found[space] += [torch.pdist(rows).mean() for rows in vectors.double().split(count)]
        for column, reward in zip(_REWARDS, (judge, second)):
            found[column] += reward.score(images, prompts).double().split(count)
        if sheet is not None and start == 0:
            rows = [images[first : first + count] for first in range(0, 4 * count, count)]
            sheet += [SheetRow(name, prompt, row) for prompt, row in zip(prompts[::count], rows)]
    return {column: torch.stack(rows) for column, rows in found.items()}


def compare(plain: Drawn, other: Drawn) -> dict[str, Any]:
    """Ratios of distances and differences of rewards, each with its interval by resampled prompts."""
    found: dict[str, Any] = {}
    for space in _SPACES:
        found[space] = {
            "distance": other[space].mean().item(),
            "ratio": (other[space].mean() / plain[space].mean()).item(),
            "ratio_interval": list(bootstrap_interval(other[space], plain[space])),
        }
    groups = torch.arange(len(plain["reward"])).repeat_interleave(plain["reward"].shape[1])
    for name in _REWARDS:
        difference = (other[name] - plain[name]).flatten()
        found[name] = {
            "mean": other[name].mean().item(),
            "difference": difference.mean().item(),
            "difference_interval": list(bootstrap_interval(difference, groups=groups)),
        }
    return found


def trained_network(work: Path) -> tuple[Path, dict[str, Any]]:
    """Folder of the network of spread pairs and what its pairs' report says; made unless they are there."""
    (name,) = DIVERSE
    data, folder = work / "pairs", work / "network"
    if not (data / "report.json").is_file():
        make_pairs(name, data)
    if not (folder / "training_report.json").is_file():
        train_network(name, folder, data=data)
    return folder, json.loads((data / "report.json").read_text())


def rows_of(figures: dict[str, Any]) -> list[list[str]]:
    """One row for each way to draw."""
    rows = []
    for name, x in figures.items():
        ratios = (
            f"{x[space]['ratio']:.3f} [{x[space]['ratio_interval'][0]:.3f}, {x[space]['ratio_interval'][1]:.3f}]"
            for space in _SPACES
        )
        rewards = (
            f"{x[reward]['mean']:.4f} ({x[reward]['difference']:+.4f} [{x[reward]['difference_interval'][0]:+.4f}, "
            f"{x[reward]['difference_interval'][1]:+.4f}])"
            for reward in _REWARDS
        )
        rows.append([name, *ratios, *rewards])
    return rows


def main(input_args: list[str] | None = None) -> None:
    """Draw in every way from the same seeds, compare with the plain pictures and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--diversity", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--diversity_of", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--golden_noise_scale", type=float, nargs="*", default=[1.0, 1.5], help="of the network")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=10, help="of each of 100 held-out prompts")
    parser.add_argument("--sheet", type=Path, help="PNG file of the first prompts' pictures")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/diversity"))
    args = parser.parse_args(input_args)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipeline = GoldenNoisePipeline.from_pipe(load_pipeline(MODEL_DIR))
    pipeline.set_progress_bar_config(disable=True)
    sheet: list[SheetRow] | None = None if args.sheet is None else []
    calls: dict[str, dict[str, Any]] = {"plain": {}}
    for way in args.diversity_of:
        calls |= {f"{way}, {dial:g}": {"diversity": dial, "diversity_of": way} for dial in args.diversity}
    calls |= {f"network, scale {scale:g}": {"golden_noise_scale": scale} for scale in args.golden_noise_scale}
    drawn, pairs = {}, None
    for name, call in calls.items():
        if "golden_noise_scale" in call and pipeline.noise_model is None:
            folder, pairs = trained_network(args.work_dir)
            pipeline.set_noise_model(load_noise_model(folder))
        drawn[name] = draw_all(pipeline, name, args.steps, args.pictures, sheet, **call)
    figures = {name: compare(drawn["plain"], other) for name, other in drawn.items()}
    text = table(["", *(f"distance, {space}" for space in _SPACES), *_REWARDS], rows_of(figures))
    text += f"\n\n{args.steps} steps, {args.pictures} seeds of 100 held-out prompts, {NUM_PROBES} probes, "
    text += f"prompts moved by {PROMPT_NOISE:g}."
    found = {"steps": args.steps, "pictures": args.pictures, "probes": NUM_PROBES, "prompt_noise": PROMPT_NOISE}
    write_results("diversity_on_digits", {**found, "figures": figures, "pairs": pairs}, text)
    if sheet:
        picture_sheet(sheet, [f"seed {i}" for i in range(args.pictures)], args.pictures).save(args.sheet)
    print(text)


if __name__ == "__main__":
    main()
