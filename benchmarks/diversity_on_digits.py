"""The dial `diversity` on the distilled digits model: how far pictures of one prompt are apart, and how well read.

python benchmarks/diversity_on_digits.py
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from diffusers_ext.evaluation.features import PixelFeatures
from diffusers_ext.evaluation.paired_comparison import bootstrap_interval
from diffusers_ext.golden_noise.diversity import NUM_PROBES
from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline
from examples.digits.check_model import load_pipeline
from examples.digits.golden_noise import HELD_OUT_PROMPTS
from examples.digits.rewards import DigitsReward, SecondDigitsReward
from examples.digits_distilled.train_model import MODEL_DIR

_SEED, _RESAMPLES = 5_000_000, 2000
_LEVELS = torch.tensor([0.025, 0.975], dtype=torch.float64)
Drawn = dict[str, torch.Tensor]


def draw_all(pipeline: GoldenNoisePipeline, diversity: float, steps: int, count: int, sheet: list | None) -> Drawn:
    """Mean pairwise distance of pixels `(prompts,)` and rewards `(prompts, count)` of all held-out prompts."""
    features, rewards = PixelFeatures(64), [DigitsReward(), SecondDigitsReward()]
    found: dict[str, list[torch.Tensor]] = {"distance": [], "reward": [], "second reward": []}
    for number, prompt in enumerate(tqdm(HELD_OUT_PROMPTS, desc=f"diversity {diversity}")):
        seeds = range(_SEED + number * count, _SEED + (number + 1) * count)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        prompts = [prompt] * count
        images = pipeline(
            prompts, generator=generators, num_inference_steps=steps, guidance_scale=1.0, diversity=diversity
        ).images
        vectors = features.extract(images).double()
        found["distance"].append(torch.cdist(vectors, vectors).sum() / (count * (count - 1)))
        for name, reward in zip(("reward", "second reward"), rewards):
            found[name].append(reward.score(images, prompts).double())
        if sheet is not None and number < 4:
            sheet.append(images)
    return {name: torch.stack(rows) for name, rows in found.items()}


def compare(plain: Drawn, other: Drawn) -> dict[str, Any]:
    """Ratio of distances and differences of rewards, each with its interval by resampled prompts."""
    count = len(plain["distance"])
    drawn = torch.randint(count, (_RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    sums = [x["distance"][drawn].sum(1) for x in (other, plain)]
    found: dict[str, Any] = {
        "distance": other["distance"].mean().item(),
        "ratio": (other["distance"].mean() / plain["distance"].mean()).item(),
        "ratio_interval": (sums[0] / sums[1]).quantile(_LEVELS).tolist(),
    }
    groups = torch.arange(count).repeat_interleave(plain["reward"].shape[1])
    for name in ("reward", "second reward"):
        difference = (other[name] - plain[name]).flatten()
        found[name] = {
            "mean": other[name].mean().item(),
            "difference": difference.mean().item(),
            "difference_interval": list(bootstrap_interval(difference, groups=groups)),
        }
    return found


def save_sheet(rows: list, path: Path) -> None:
    """Pictures of the first prompts, a row each, as a PNG file."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    sheet.save(path)


def main(input_args: list[str] | None = None) -> None:
    """Draw at every diversity from the same seeds, compare with 0 and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--diversity", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=10, help="of each of 100 held-out prompts")
    parser.add_argument("--sheet", type=Path, help="PNG file of the first prompts' pictures")
    args = parser.parse_args(input_args)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipeline = GoldenNoisePipeline.from_pipe(load_pipeline(MODEL_DIR))
    pipeline.set_progress_bar_config(disable=True)
    sheet: list | None = None if args.sheet is None else []
    plain = draw_all(pipeline, 0.0, args.steps, args.pictures, sheet)
    found, rows = {"0": compare(plain, plain)}, []
    for diversity in args.diversity:
        found[str(diversity)] = compare(plain, draw_all(pipeline, diversity, args.steps, args.pictures, sheet))
    for diversity, x in found.items():
        cells = [
            f"{x[name]['mean']:.4f} ({x[name]['difference']:+.4f} [{x[name]['difference_interval'][0]:+.4f}, "
            f"{x[name]['difference_interval'][1]:+.4f}])"
            for name in ("reward", "second reward")
        ]
        low, high = x["ratio_interval"]
        rows.append([diversity, f"{x['distance']:.2f}", f"{x['ratio']:.3f} [{low:.3f}, {high:.3f}]", *cells])
    text = table(["diversity", "distance", "ratio", "reward", "second reward"], rows)
    text += f"\n\n{args.steps} steps, {args.pictures} seeds of 100 held-out prompts, {NUM_PROBES} probes."
    write_results("diversity_on_digits", {"steps": args.steps, "probes": NUM_PROBES, "figures": found}, text)
    if sheet:
        save_sheet(sheet, args.sheet)
    print(text)


if __name__ == "__main__":
    main()
