"""What projecting a finished LoRA leaves of its subject, and mends of what it had ruined; against PEFT's own way.

python benchmarks/debleeding_on_digits.py --seeds 3
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.baselines.intruders import reduce_intruders
from benchmarks.machine import table, write_results
from diffusers_ext import FeatureStatistics, collect_statistics, debleed_lora
from diffusers_ext.families.lora_files import write_lora
from examples.digits.check_model import draw, load_pipeline
from examples.digits.judge import DigitsJudge
from examples.digits.prompts import HELD_OUT_PAIRS, HELD_OUT_TEMPLATE, TEMPLATES, TRAINING_PAIRS, prompt_pairs
from examples.digits.subjects import (
    INSTANCE_PROMPTS,
    PLAIN_FLAGS,
    glyph_share,
    knowledge_prompts,
    load_with_loras,
    train_subject,
)

GLYPH = "triangle"
DAMPINGS = (1e-3, 10.0, 100.0)
STRICTNESSES = (1.0, 3.0, 10.0, 30.0, 100.0)
MITIGATIONS = (0.75, 0.5, 0.25, 0.0)  # of PEFT's intruder dimensions; 0.75 is its default
GROUPS = {
    "known": prompt_pairs(TEMPLATES[0], TRAINING_PAIRS),
    "held_out": prompt_pairs(TEMPLATES[0], HELD_OUT_PAIRS) + prompt_pairs(HELD_OUT_TEMPLATE, TRAINING_PAIRS),
}


def examine(lora: Path, seed: int, judge: DigitsJudge) -> dict[str, float]:
    """Shares of 40 pictures of the glyph and of one picture per other prompt that read as asked."""
    pipeline = load_with_loras([lora])
    glyph, _ = glyph_share(pipeline, GLYPH, judge, count=40, seed=7_000 + seed)
    shares = {"glyph": glyph}
    for name, prompts in GROUPS.items():
        pictures = draw(pipeline, prompts, seed=8_000 + seed, description=f"draw {name}")
        shares[name] = float(judge.correct(pictures, prompts).mean())
    return shares


def measure_seed(
    folder: Path, statistics: FeatureStatistics, judge: DigitsJudge, seed: int
) -> dict[str, dict[str, float]]:
    """Train a plain LoRA, then look at it and at its projections."""
    flags = (*PLAIN_FLAGS, "--learning_rate", "1e-2")
    lora = train_subject(folder, f"plain_{seed}", GLYPH, flags, seed=seed)
    figures = {"as trained": examine(lora, seed, judge)}
    subject = {"pipeline": load_pipeline(), "instance_prompts": [INSTANCE_PROMPTS[GLYPH]]}
    ways = {f"damping {value:g}": {"damping": value} for value in DAMPINGS}
    ways |= {f"strictness {value:g}": {"strictness": value, **subject} for value in STRICTNESSES}
    for name, way in ways.items():
        projected = folder / f"{name} {seed}" / "pytorch_lora_weights.safetensors"
        debleed_lora(lora, statistics, output_path=projected, **way)
        figures[name] = examine(projected.parent, seed, judge)
    for value in MITIGATIONS:
        reduced = folder / f"intruders {value:g} {seed}" / "pytorch_lora_weights.safetensors"
        write_lora(reduce_intruders(load_pipeline(), lora, value), reduced)
        figures[f"PEFT's reduce_intruder_dimension {value:g}"] = examine(reduced.parent, seed, judge)
    return figures


def results_table(seeds: list[dict[str, dict[str, float]]]) -> str:
    """Means over the seeds, the worst seed in brackets."""
    rows = []
    for name in seeds[0]:
        shares = ([figures[name][key] for figures in seeds] for key in ("glyph", *GROUPS))
        rows.append([name, *(f"{np.mean(share):.3f} ({min(share):.2f})" for share in shares)])
    return table(["plain LoRA", "new glyph", "old digits", "held-out prompts"], rows)


def main(input_args: list[str] | None = None) -> dict[str, Any]:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(input_args)
    statistics = collect_statistics(load_pipeline(), knowledge_prompts())
    judge = DigitsJudge(glyphs=True)
    with tempfile.TemporaryDirectory() as folder:
        seeds = [measure_seed(Path(folder), statistics, judge, seed) for seed in range(args.seeds)]
    text = results_table(seeds)
    write_results("debleeding_on_digits", {"seeds": seeds}, text)
    print(text)
    return {"seeds": seeds}


if __name__ == "__main__":
    main()
