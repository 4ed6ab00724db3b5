"""How fast noise pairs are made in batches, against one by one, on the digits model.

python benchmarks/pair_generation.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from benchmarks.timing import compare
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from diffusers_ext.golden_noise.redenoise import encode_prompts, redenoise_sequence
from diffusers_ext.rewards.reward import Reward
from diffusers_ext.training.golden_noise.rendering import square_latent_shape
from diffusers_ext.training.pairs import Candidate, PairMaker, PairSettings, list_candidates
from examples.digits.check_model import load_pipeline
from examples.digits.prompts import TEMPLATES, TRAINING_PAIRS, prompt_pairs
from examples.digits.rewards import DigitsReward

SETTINGS = PairSettings(prompt_file="of no file", output_dir="none", num_inference_steps=6, guidance_scale=1.5)


def one_by_one(pipeline: DiffusionPipeline, reward: Reward, candidates: Sequence[Candidate]) -> list[float]:
    """The gains of pairs made as scripts usually do: each alone, its pictures one after another."""
    shape = square_latent_shape(pipeline, None)
    gains = []
    for candidate in candidates:
        noise = source_noise(candidate.seed, shape)[None].to(pipeline.device)
        text = encode_prompts(pipeline, [candidate.prompt])
        golden = redenoise_sequence(pipeline, noise, text, repeats=1)[:, 0]
        scores = []
        for latents in (noise, golden):
            with quiet_run(pipeline):
                images = pipeline(
                    candidate.prompt,
                    latents=latents,
                    num_inference_steps=SETTINGS.num_inference_steps,
                    guidance_scale=SETTINGS.guidance_scale,
                ).images
            scores.append(reward.score(images, [candidate.prompt]).item())
        gains.append(scores[1] - scores[0])
    return gains


def in_batches(maker: PairMaker, candidates: Sequence[Candidate], batch_size: int) -> int:
    """The number of pairs kept of those made `batch_size` at once."""
    batches = (candidates[i : i + batch_size] for i in range(0, len(candidates), batch_size))
    return sum(len(maker.make(batch).pairs) for batch in batches)


def main(input_args: list[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=64, help="noise pairs of one measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args(input_args)
    pipeline, reward = load_pipeline(), DigitsReward()
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    prompts = [prompt for template in TEMPLATES for prompt in prompt_pairs(template, TRAINING_PAIRS)]
    candidates = list_candidates(prompts, 1, seed=0)[: args.pairs]
    maker = PairMaker(pipeline, square_latent_shape(pipeline, None), SETTINGS, reward)
    rows, results = [], {}
    for size in args.batch_sizes:
        ratio = compare(
            lambda: one_by_one(pipeline, reward, candidates),
            lambda size=size: in_batches(maker, candidates, size),
            args.repeats,
        )
        speeds = [len(candidates) / s for s in (ratio.first_seconds, ratio.second_seconds)]
        results[size] = {**ratio._asdict(), "pairs_per_second": speeds}
        times = f"{ratio.median:.2f} ({ratio.lowest:.2f} to {ratio.highest:.2f})"
        rows.append([str(size), f"{speeds[1]:.1f}", f"{speeds[0]:.1f}", times])
    text = table(["batch", "pairs a second", "one by one", "times as fast (range)"], rows)
    write_results("pair_generation", {"batch_sizes": results}, text)
    print(text)


if __name__ == "__main__":
    main()
