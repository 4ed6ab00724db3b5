"""Make noise pairs on the digits model, train a golden-noise network on them, show what it does.

python examples/demo_golden_noise.py --output_dir outputs/demo/golden_noise
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table
from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.evaluation.golden_noise import evaluate_golden_noise
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.evaluation.golden_noise_subjects import RedenoisedTarget
from diffusers_ext.golden_noise import load_noise_model
from examples.digits.check_model import load_pipeline
from examples.digits.golden_noise import (
    GUIDANCE_SCALE,
    HELD_OUT_PROMPTS,
    make_pairs,
    train_network,
)
from examples.digits.rewards import DigitsReward, SecondDigitsReward


# A tenth of the pairs and steps of the full training, which the benchmark runs.
_NOISES_PER_PROMPT, _STEPS = 4, 400
_SHOWN = 8  # of 100 prompts, those that random noise serves worst: most others are right anyway


def rows_of(report: GoldenNoiseReport, trained_seconds: float) -> list[list[str]]:
    """Probability, win rate and second reward of each noise, and what it costs."""
    first, second = report.settings["rewards"]
    standard = next(iter(report.scores.values()))
    means = [f"{standard[label]['mean_standard']:.3f}" for label in (first, second)]
    rows = [["random noise", means[0], "-", means[1], "1.00"]]
    draw = report.cost["standard"]["seconds"]
    for side, found in report.scores.items():
        cost = report.cost.get(side)
        seconds = report.best_of["seconds"][-1] if cost is None else cost["seconds"]
        name = f"{side} ({trained_seconds:.0f} s)" if side == "trained network" else side
        win = f"{found[first]['win_rate']:.2f}"
        values = [f"{found[label]['mean_other']:.3f}" for label in (first, second)]
        rows.append([name, values[0], win, values[1], f"{seconds / draw:.2f}"])
    return rows


def run(output_dir: Path) -> str:
    """Pairs, training and evaluation below `output_dir`; returns the table.

    The sheet shows the prompts that random noise serves worst.
    """
    for part in ("pairs", "network"):  # of an earlier demo
        shutil.rmtree(output_dir / part, ignore_errors=True)
    pairs = make_pairs(output_dir / "pairs", num_steps=1, noises_per_prompt=_NOISES_PER_PROMPT)
    started = time.perf_counter()
    folder = train_network("GoldenNoiseModel", pairs, output_dir / "network", steps=_STEPS)
    trained_seconds, pipeline = time.perf_counter() - started, load_pipeline()
    report = evaluate_golden_noise(
        pipeline,
        HELD_OUT_PROMPTS,
        refine={
            "re-denoised target": RedenoisedTarget(pipeline),
            "trained network": load_noise_model(folder),
        },
        rewards=[DigitsReward(), SecondDigitsReward()],
        num_images_per_prompt=2,
        num_inference_steps=4,
        guidance_scale=GUIDANCE_SCALE,
        batch_size=50,
        sheet_prompts=len(HELD_OUT_PROMPTS),
    )
    worst = sorted(report.kept, key=lambda kept: kept.scores["standard"])
    shown = list(dict.fromkeys(kept.prompt for kept in worst))[:_SHOWN]
    report.kept = [kept for kept in report.kept if kept.prompt in shown]
    report.picture_sheet(output_dir / "sheet.png")
    header = ["noise (training)", "probability", "win rate", "second reward", "time"]
    text = table(header, rows_of(report, trained_seconds))
    write_atomically(output_dir / "table.md", text + "\n")
    return text


def main(input_args: list[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo/golden_noise"))
    args = parser.parse_args(input_args)
    print(f"\n{run(args.output_dir)}\n\nPictures: {args.output_dir / 'sheet.png'}")


if __name__ == "__main__":
    main()
