"""The demo's part on the concept eraser: a digit erased from the moving-digits CogVideoX."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_ext.eraser import load_eraser, save_eraser
from diffusers_ext.evaluation.erasure import ClipShot, clip_shots
from diffusers_ext.evaluation.erasure_report import ErasureReport
from examples.demo_report import Comparison, Findings, Gallery, Picture, Step, Table
from examples.digits.prompts import COLORS
from examples.moving_digits.check_model import load_pipeline
from examples.moving_digits.erasers import (
    EVALUATION_SEED,
    RECIPE,
    base_clips_of,
    evaluate,
    evaluation_groups,
    train_digits_eraser,
)
from examples.moving_digits.judge import ClipReading, MovingDigitsJudge
from examples.moving_digits.prompts import read_prompt

TARGET = "three"
# Less of everything than in the full training, which the benchmark runs.
_RECIPE = replace(RECIPE, max_train_steps=200, num_target_trajectories=48, num_preserved_trajectories=96)
_CLIPS = {"num_target": 40, "num_preserved": 90, "num_robust": 40}
_ON_SHEET = {"target": 4, "preserved": 4, "held-out template": 1, "paraphrases": 1}
_SHOWN = {"target": 6, "preserved": 6, "held-out template": 1, "paraphrases": 2}
_GALLERIES = {
    f"Prompts for “{TARGET}”": (
        ("target",),
        f"✓ with the eraser: no {TARGET} was read. Colour and motion should stay.",
    ),
    "Prompts for other digits": (("preserved",), "Nothing should change here."),
    f"“{TARGET}” in words that the training did not see": (
        ("held-out template", "paraphrases"),
        f"A wording kept out of the training, and paraphrases. ✓ with the eraser: no {TARGET} was read.",
    ),
}
_SIDES = {"base": "base model", "erased": "with the eraser"}
_HEADER = (
    "prompts", "clips", "digit", "digit, erased", "colour", "colour, erased", "motion",
    "motion, erased",
)  # fmt: skip


class EraserDemo:
    """Draws the base's clips, trains an eraser, loads it into a fresh pipeline and evaluates it.

    Args:
        output_dir: gets the eraser, the report's files, `clips` and `sheet.png`.
    """

    name = "eraser"
    title = "Erase a concept from a video model"
    explanation = (
        "Small bottlenecks beside the attention of CogVideoX learn, from prompts alone, to lead one "
        "concept's prompts to another concept and to leave all other prompts where they were.",
        f"Here the word “{TARGET}” is erased. What its prompts show instead is chosen by the model: the "
        "nearest of the other digits. The eraser is a PEFT adapter that loads in one line, with a "
        "strength of its own.",
    )
    commands = """\
accelerate launch training/train_eraser.py \\
  --pretrained_model_name_or_path THUDM/CogVideoX-5b \\
  --target_concept dog --anchor_concept auto --prompts_file prompts.txt \\
  --auto_preserved_concepts --mixed_precision bf16 --gradient_checkpointing \\
  --output_dir outputs/no-dog"""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.groups = evaluation_groups(TARGET, **_CLIPS)
        self.shots = clip_shots(self.groups, 1, EVALUATION_SEED)
        self.base_clips: np.ndarray | None = None
        self.trained_seconds = 0.0

    def steps(self) -> list[Step]:
        """Base clips, training, evaluation."""
        return [
            Step("Draw clips with the base model", self._draw),
            Step(f"Train an eraser of “{TARGET}”", self._train),
            Step("Draw and judge the same clips with the eraser", self._evaluate),
        ]

    def _draw(self) -> Findings:
        self.base_clips = base_clips_of(load_pipeline(), self.groups)
        indices = shown_indices(self.shots, _SHOWN)
        return Findings(galleries(self.shots, {"base": self.base_clips}, indices))

    def _train(self) -> Findings:
        pipeline, began = load_pipeline(), time.perf_counter()
        train_digits_eraser(pipeline, TARGET, recipe=_RECIPE)
        self.trained_seconds = time.perf_counter() - began
        save_eraser(pipeline, self.output_dir / "eraser")
        return Findings()

    def _evaluate(self) -> Findings:
        pipeline = load_pipeline()
        load_eraser(pipeline, self.output_dir / "eraser")
        report = evaluate(pipeline, TARGET, self.groups, base_clips=self.base_clips, kept_clips=max(_CLIPS.values()))
        erased = np.stack([one.clips["erased"] for one in report.kept])
        report.kept = [report.kept[index] for index in shown_indices(self.shots, _ON_SHEET)]
        report.save(self.output_dir)
        clips = {"base": self.base_clips, "erased": erased}
        text = (
            "Shares of clips in which the judge reads what the prompt asks for, without and with the "
            f"eraser. Trained in {self.trained_seconds:.0f} s."
        )
        figures = Table("What was erased and what was kept", text, _HEADER, table_rows(report))
        shown = galleries(self.shots, clips, shown_indices(self.shots, _SHOWN))
        return Findings([figures, *shown], sentence(report))


def table_rows(report: ErasureReport) -> list[list[str]]:
    """What is read with and without the eraser, group by group."""
    rows = []
    for name in _SHOWN:
        rates = report.groups[name]["rates"][report.sides[0]]
        cells = [
            f"{rates[aspect][side]:.2f}" for aspect in ("digit", "color", "direction") for side in ("base", "other")
        ]
        rows.append([name, str(report.groups[name]["clips"]), *cells])
    return rows


def sentence(report: ErasureReport) -> str:
    """What was erased and what was kept."""
    target, preserved = (report.groups[name] for name in ("target", "preserved"))
    shown = target["readings"]["reads_as"][report.sides[0]]
    read, kept = (
        [round(group["clips"] * report.rate(name, side=side)) for side in ("base", None)]
        for name, group in (("target", target), ("preserved", preserved))
    )
    return (
        f"Of {target['clips']} clips that ask for a {TARGET}, {read[0]} show one before and {read[1]} "
        f"with the eraser; most show a {max(shown, key=shown.get)} instead. Of {preserved['clips']} "
        f"clips of other digits, {kept[0]} are right before and {kept[1]} with the eraser."
    )


def shown_indices(shots: Sequence[ClipShot], counts: Mapping[str, int]) -> list[int]:
    """A few shots of each group, evenly chosen so that template, colour and the rest change."""
    found = []
    for name, count in counts.items():
        group = [index for index, shot in enumerate(shots) if shot.group == name]
        step = len(group) * (len(COLORS) + 1) // (count * len(COLORS)) + 1
        found += dict.fromkeys(group[step * number % len(group)] for number in range(count))
    return found


def galleries(shots: Sequence[ClipShot], clips: Mapping[str, np.ndarray], indices: Sequence[int]) -> list[Gallery]:
    """The chosen shots, with the clips of all sides.

    Args:
        shots: all that were drawn.
        clips: `{side: (shots, frames, height, width, 3) uint8}`.
        indices: of the shots to show.
    """
    judge = MovingDigitsJudge()
    readings = {side: judge.read(drawn[indices]) for side, drawn in clips.items()}
    found = []
    for title, (groups, text) in _GALLERIES.items():
        comparisons = []
        for position, index in enumerate(indices):
            shot = shots[index]
            if shot.group in groups:
                sides = {
                    _SIDES[side]: _picture(shot, side, drawn[index], readings[side], position)
                    for side, drawn in clips.items()
                }
                comparisons.append(Comparison(shot.prompt, shot.seed, sides))
        found.append(Gallery(title, text, comparisons))
    return found


def _picture(shot: ClipShot, side: str, clip: np.ndarray, reading: ClipReading, position: int) -> Picture:
    read = (reading.colors[position], reading.digits[position], reading.directions[position])
    right = read == tuple(read_prompt(shot.prompt))
    if side == "erased" and shot.group != "preserved":
        right = reading.digits[position] != TARGET
    text = f"{read[0]} {read[1]} moving {read[2]}"
    return Picture([Image.fromarray(frame) for frame in clip], text, right)
