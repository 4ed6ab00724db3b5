"""Erase a digit from the moving-digits CogVideoX and show what its prompts draw then.

python examples/demo_eraser.py --output_dir outputs/demo/eraser
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table
from diffusers_ext.eraser import load_eraser, save_eraser
from diffusers_ext.evaluation.clip_sheet import KeptClip
from diffusers_ext.evaluation.erasure_report import ErasureReport
from examples.digits.prompts import COLORS
from examples.moving_digits.check_model import load_pipeline
from examples.moving_digits.erasers import (
    RECIPE,
    evaluate,
    evaluation_groups,
    train_digits_eraser,
)


TARGET = "three"
# Less of everything than in the full training, which the benchmark runs.
_RECIPE = replace(
    RECIPE, max_train_steps=300, num_target_trajectories=48, num_preserved_trajectories=96
)
_CLIPS = {"num_target": 40, "num_preserved": 90, "num_robust": 40}
_SHOWN = {"target": 4, "preserved": 4, "held-out template": 1, "paraphrases": 1}


def rows_of(report: ErasureReport) -> list[list[str]]:
    """What is read with and without the eraser, group by group."""
    rows = []
    for name, group in report.groups.items():
        if name in ("target", "preserved", "held-out template", "paraphrases"):
            rates = group["rates"][report.sides[0]]
            cells = [
                f"{rates[aspect][side]:.2f}"
                for aspect in ("digit", "color", "direction")
                for side in ("base", "other")
            ]
            rows.append([name, str(group["clips"]), *cells])
    return rows


def shown(report: ErasureReport) -> list[KeptClip]:
    """A few clips of each group: of one template, one colour and one direction or digit each."""
    kept = []
    for name, count in _SHOWN.items():
        group = [clip for clip in report.kept if clip.group == name]
        step = len(group) * (len(COLORS) + 1) // (count * len(COLORS)) + 1
        kept += group[: step * count : step]
    return kept


def run(output_dir: Path) -> str:
    """Train, save, load into a fresh pipeline, and evaluate below `output_dir`; returns the table."""
    pipeline, began = load_pipeline(), time.perf_counter()
    train_digits_eraser(pipeline, TARGET, recipe=_RECIPE)
    seconds = time.perf_counter() - began
    save_eraser(pipeline, output_dir / "eraser")
    pipeline = load_pipeline()
    load_eraser(pipeline, output_dir / "eraser")
    groups = evaluation_groups(TARGET, **_CLIPS)
    report = evaluate(pipeline, TARGET, groups, kept_clips=max(_CLIPS.values()))
    report.kept = shown(report)
    report.save(output_dir)
    header = ["prompts", "clips"]
    header += [f"{a}{side}" for a in ("digit", "colour", "motion") for side in ("", ", erased")]
    text = table(header, rows_of(report)) + f"\n\nErased: {TARGET}, trained in {seconds:.0f} s."
    return text


def main(input_args: list[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo/eraser"))
    args = parser.parse_args(input_args)
    print(f"\n{run(args.output_dir)}\n\nPictures: {args.output_dir / 'sheet.png'}")


if __name__ == "__main__":
    main()
