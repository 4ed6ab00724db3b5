"""The demo's part on golden noise: pairs, a network trained on them, and what its noise draws."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import table
from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.evaluation.golden_noise import RedenoisedTarget, evaluate_golden_noise
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.evaluation.noise_summary import STANDARD, KeptPictures
from diffusers_ext.golden_noise import load_noise_model
from examples.demo_report import Comparison, Findings, Gallery, Picture, Step, Table
from examples.digits.check_model import load_pipeline
from examples.digits.golden_noise import GUIDANCE_SCALE, HELD_OUT_PROMPTS, make_pairs, train_network
from examples.digits.judge import DigitsJudge
from examples.digits.prompts import read_prompt
from examples.digits.rewards import DigitsReward, SecondDigitsReward

# A tenth of the pairs and steps of the full training, which the benchmark runs.
_NOISES_PER_PROMPT, _STEPS = 4, 400
_ON_SHEET, _SHOWN = 8, 6  # prompts that random noise serves worst: most others are right anyway
_TYPICAL_STRIDE = 34
_SIDES = {STANDARD: "random noise", "re-denoised target": "re-denoised", "trained network": "network"}
_HEADER = ("noise (training)", "probability", "win rate", "second reward", "time")
_TABLE_TEXT = (
    "100 prompts that no training saw, two seeds each. Probability: of the digit asked for, by the "
    "classifier that also filtered the pairs. Win rate: share of pictures that beat random noise from "
    "the same seed. The second reward took part in nothing. Time: relative to drawing once."
)


class GoldenNoiseDemo:
    """Makes pairs, trains a network and evaluates it.

    Args:
        output_dir: gets the pairs, the network, `sheet.png` and `table.md`.
    """

    name = "golden-noise"
    title = "Golden noise"
    explanation = (
        "A picture starts from random noise, and some noise suits a prompt better than other. Pairs of "
        "random and better noise are made by re-denoising: one step of denoising with strong guidance, "
        "then one step back with little.",
        "A small network learns from the pairs to turn any seed's noise into better noise at once. "
        "The base model stays as it is; the few steps and the little guidance used here leave room for "
        "improvement.",
    )
    commands = """\
accelerate launch training/generate_npd.py --pretrained_model_name_or_path <base> \\
  --prompt_file prompts.txt --output_dir outputs/pairs
accelerate launch training/train_npnet.py --pretrained_model_name_or_path <base> \\
  --model golden_noise_model --dataset_dir outputs/pairs --output_dir outputs/network
accelerate launch training/evaluate_golden_noise.py --pretrained_model_name_or_path <base> \\
  --noise_model outputs/network --prompt_file held_out.txt --reward hpsv2 \\
  --output_dir outputs/table"""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.trained_seconds = 0.0

    def steps(self) -> list[Step]:
        """Pairs, network, evaluation."""
        return [
            Step("Make pairs of noise", self._make_pairs),
            Step("Train the network", self._train),
            Step("Draw and judge 100 unseen prompts", self._evaluate),
        ]

    def _make_pairs(self) -> Findings:
        for part in ("pairs", "network"):  # of an earlier demo
            shutil.rmtree(self.output_dir / part, ignore_errors=True)
        folder = make_pairs(self.output_dir / "pairs", num_steps=1, noises_per_prompt=_NOISES_PER_PROMPT)
        found = json.loads((folder / "report.json").read_text())
        rows = [[str(found["tried"]), str(found["kept"]), f"{found['win_rate']:.2f}"]]
        text = "A pair is kept where its better noise draws the picture that the reward prefers."
        header = ("pairs tried", "kept", "better than random noise")
        return Findings([Table("Training pairs", text, header, rows)])

    def _train(self) -> Findings:
        started = time.perf_counter()
        train_network("GoldenNoiseModel", self.output_dir / "pairs", self.output_dir / "network", steps=_STEPS)
        self.trained_seconds = time.perf_counter() - started
        return Findings()

    def _evaluate(self) -> Findings:
        pipeline = load_pipeline()
        report = evaluate_golden_noise(
            pipeline,
            HELD_OUT_PROMPTS,
            refine={
                "re-denoised target": RedenoisedTarget(pipeline),
                "trained network": load_noise_model(self.output_dir / "network"),
            },
            rewards=[DigitsReward(), SecondDigitsReward()],
            num_images_per_prompt=2,
            num_inference_steps=4,
            guidance_scale=GUIDANCE_SCALE,
            batch_size=50,
            sheet_prompts=len(HELD_OUT_PROMPTS),
        )
        rows = table_rows(report, self.trained_seconds)
        write_atomically(self.output_dir / "table.md", table(list(_HEADER), rows) + "\n")
        figures = Table("Noise against noise", _TABLE_TEXT, _HEADER, rows)
        shown = galleries(report.kept)
        worst = worst_prompts(report.kept, _ON_SHEET)
        report.kept = [kept for kept in report.kept if kept.prompt in worst]
        report.picture_sheet(self.output_dir / "sheet.png")
        return Findings([figures, *shown], sentence(report))


def table_rows(report: GoldenNoiseReport, trained_seconds: float) -> list[list[str]]:
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


def sentence(report: GoldenNoiseReport) -> str:
    """The network against random noise."""
    found = report.scores["trained network"][report.settings["rewards"][0]]
    extra = report.cost["trained network"]["seconds"] / report.cost["standard"]["seconds"] - 1
    return (
        f"The network's noise beats random noise in {found['win_rate']:.0%} of pictures: the digit "
        f"asked for is read with probability {found['mean_other']:.3f} in place of "
        f"{found['mean_standard']:.3f}, for {extra:.0%} more time."
    )


def worst_prompts(kept: Sequence[KeptPictures], count: int) -> list[str]:
    """The `count` prompts with the pictures that score least from random noise."""
    worst = sorted(kept, key=lambda one: one.scores[STANDARD])
    return list(dict.fromkeys(one.prompt for one in worst))[:count]


def galleries(kept: Sequence[KeptPictures]) -> list[Gallery]:
    """Each worst prompt with its worse seed, and prompts as they come."""
    by_prompt: dict[str, list[KeptPictures]] = {}
    for one in kept:
        by_prompt.setdefault(one.prompt, []).append(one)
    worst = [min(by_prompt[prompt], key=lambda one: one.scores[STANDARD]) for prompt in worst_prompts(kept, _SHOWN)]
    typical = [found[0] for found in list(by_prompt.values())[::_TYPICAL_STRIDE]]
    judge = DigitsJudge()
    return [
        Gallery(
            "Where random noise fails",
            f"The {_SHOWN} prompts of 100 that random noise serves worst, chosen for that. The number "
            "is the probability of the digit that was asked for.",
            [_comparison(one, judge) for one in worst],
        ),
        Gallery(
            "Where it does not",
            f"Every {_TYPICAL_STRIDE}th prompt with its first seed: most pictures are right from any noise.",
            [_comparison(one, judge) for one in typical],
        ),
    ]


def _comparison(one: KeptPictures, judge: DigitsJudge) -> Comparison:
    reading = judge.read(list(one.pictures.values()))
    pictures = {}
    for index, (side, image) in enumerate(one.pictures.items()):
        read = reading.colors[index], reading.names[index]
        text = f"{' '.join(read)}, {one.scores[side]:.3f}"
        pictures[_SIDES[side]] = Picture([image], text, read == read_prompt(one.prompt))
    return Comparison(one.prompt, one.seed, pictures)
