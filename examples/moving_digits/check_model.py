"""Ask a bundled moving-digits model for every kind of prompt and let the judge read the clips.

python examples/moving_digits/check_model.py --output_dir outputs/moving_digits_check
python examples/moving_digits/check_model.py --model examples/moving_digits_wan/model
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXPipeline, DiffusionPipeline, WanPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, only this folder is on the path

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.evaluation.rendering import render_clips
from diffusers_ext.hub.saved_pipelines import with_known_dtype
from examples.digits.prompts import COLORS, DIGITS
from examples.moving_digits.clips import CANVAS, NUM_FRAMES
from examples.moving_digits.judge import MovingDigitsJudge
from examples.moving_digits.prompts import (
    COMBINATIONS,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_TEMPLATE,
    NEUTRAL_COLOR,
    NEUTRAL_DIGIT,
    PARAPHRASES,
    PROMPT_LENGTH,
    TEMPLATES,
    write_prompts,
)

MODEL_DIR = Path(__file__).parent / "model"
WAN_DIR = Path(__file__).parents[1] / "moving_digits_wan" / "model"
# How clips are drawn wherever a bundled model is measured.
SAMPLING = {
    "num_frames": NUM_FRAMES,
    "height": CANVAS,
    "width": CANVAS,
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "max_sequence_length": PROMPT_LENGTH,
}


def load_pipeline(path: str | Path = MODEL_DIR) -> CogVideoXPipeline | WanPipeline:
    """A bundled model in float32, without its progress bar."""
    pipeline = DiffusionPipeline.from_pretrained(path, **with_known_dtype({"dtype": torch.float32}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: CogVideoXPipeline | WanPipeline, prompts: Sequence[str], *, seed: int, description: str = "draw"
) -> np.ndarray:
    """One clip per prompt, `(n, 9, 16, 16, 3)` uint8; clip `i` has seed `seed + i` at any batch size."""
    seeds = range(seed, seed + len(prompts))
    return render_clips(pipeline, prompts, seeds=seeds, batch_size=50, description=description, **SAMPLING)


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """`count` of `prompts`, evenly chosen; repeated where there are fewer."""
    if count >= len(prompts):
        return [prompts[index % len(prompts)] for index in range(count)]
    return [prompts[index * len(prompts) // count] for index in range(count)]


def _prompts_of(combinations: Sequence[tuple[str, str, str]]) -> list[str]:
    return [
        template.format(color=color, digit=digit, direction=direction)
        for template in TEMPLATES
        for color, digit, direction in combinations
    ]


def rates(judge: MovingDigitsJudge, clips: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """Share of clips that show the digit, the colour, the direction, and all that was asked for."""
    found = judge.correct(clips, prompts)
    aspects = {name: found[name] for name in ("digit", "color", "direction")}
    every = np.stack([np.ma.filled(right, True) for right in aspects.values()]).all(axis=0)
    return {name: float(right.mean()) for name, right in {**aspects, "all": every}.items()}


def main(input_args: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print and write the share of clips that show what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/moving_digits_check"))
    args = parser.parse_args(input_args)
    pipeline, judge = load_pipeline(args.model), MovingDigitsJudge()
    groups = {
        "trained": _prompts_of(COMBINATIONS),
        "held_out_pairs": _prompts_of(HELD_OUT_COMBINATIONS),
        "held_out_template": write_prompts(templates=(HELD_OUT_TEMPLATE,)),
        "paraphrases": write_prompts(templates=PARAPHRASES),
    }
    shares: dict[str, dict[str, float]] = {}
    for name, prompts in groups.items():
        asked = spread(prompts, args.samples)
        clips = draw(pipeline, asked, seed=1_000_000, description=name)
        shares[name] = rates(judge, clips, asked)
    for kind, prompts, words in (
        ("reads_as", write_prompts(digits=(NEUTRAL_DIGIT,)), DIGITS),
        ("reads_as_color", write_prompts(colors=(NEUTRAL_COLOR,)), tuple(COLORS)),
    ):
        asked = spread(prompts, args.samples)
        clips = draw(pipeline, asked, seed=2_000_000, description=f"neutral {kind}")
        found = judge.correct(clips, asked)[kind].tolist()
        shares[f"neutral prompts: {kind}"] = {w: found.count(w) / len(found) for w in words}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output_dir / "shares.json", json.dumps(shares, indent=1) + "\n")
    print(json.dumps(shares, indent=1))
    return shares


if __name__ == "__main__":
    main()
