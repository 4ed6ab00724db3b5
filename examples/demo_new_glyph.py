"""The demo's part on null-space DreamBooth: a new glyph learnt twice, and what each LoRA kept."""

from __future__ import annotations

import time
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.machine import table
from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.evaluation.features import pixel_drift
from examples.demo_report import Comparison, Findings, Gallery, Picture, Step, Table
from examples.digits.check_model import draw
from examples.digits.judge import DigitsJudge, Reading
from examples.digits.prompts import (
    HELD_OUT_PAIRS,
    HELD_OUT_TEMPLATE,
    TEMPLATES,
    TRAINING_PAIRS,
    prompt_pairs,
    read_prompt,
)
from examples.digits.subject_sheet import subject_sheet
from examples.digits.subjects import INSTANCE_PROMPTS, NULL_SPACE_FLAGS, PLAIN_FLAGS, load_with_loras, train_subject

GLYPH = "triangle"
PROMPTS = {
    "known": prompt_pairs(TEMPLATES[0], TRAINING_PAIRS),
    "glyph": [INSTANCE_PROMPTS[GLYPH]] * 40,
    "held_out": prompt_pairs(TEMPLATES[0], HELD_OUT_PAIRS) + prompt_pairs(HELD_OUT_TEMPLATE, TRAINING_PAIRS),
}
SEEDS = {"glyph": 7_000, "known": 8_000, "held_out": 9_000}  # of the first picture of each group
BASE = "base model"
# Three quarters of the benchmark's steps, for both.
_STEPS = ("--max_train_steps", "750")
LORAS = {
    "plain LoRA": (*PLAIN_FLAGS, "--learning_rate", "1e-2", *_STEPS),
    "null-space LoRA": (*NULL_SPACE_FLAGS, *_STEPS),
}


class _GalleryPlan(NamedTuple):
    title: str
    text: str
    stride: int  # every so many prompts are shown
    count: int  # at most


_GALLERIES = {
    "glyph": _GalleryPlan(
        "The new glyph",
        f"“sks” is a word without a meaning until a LoRA gives it one, here a {GLYPH}. The first "
        "three of 40 pictures.",
        1,
        3,
    ),
    "known": _GalleryPlan(
        "Old digits", "What the model knew before and should still know: every seventh of 40 prompts.", 7, 6
    ),
    "held_out": _GalleryPlan(
        "Pairs and wording that nobody protected",
        "The null-space LoRA was not told of these prompts either: every seventeenth of 50.",
        17,
        3,
    ),
}


class NewGlyphDemo:
    """Trains both LoRAs and measures all three models, always from the same seeds.

    Args:
        output_dir: gets the LoRAs, `sheet.png` and `table.md`.
    """

    name = "new-glyph"
    title = "Teach a new glyph"
    explanation = (
        "DreamBooth teaches a diffusion model a new subject from a handful of pictures, and tends to "
        "overwrite what the model knew. The null-space LoRA trains only along directions that the "
        "listed knowledge prompts do not use.",
        f"Six white pictures of a {GLYPH} are learnt twice in 750 steps of the same batch and schedule: "
        "by a plain LoRA of rank 8, and by a null-space LoRA of rank 1. The result is an ordinary "
        "LoRA file that stock diffusers loads.",
    )
    commands = """\
accelerate launch training/train_nullspace_dreambooth.py \\
  --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
  --instance_data_dir photos --instance_prompt "a photo of sks dog" \\
  --knowledge_prompts knowledge.txt --output_dir outputs/dog"""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.loras: dict[str, list[Path]] = {BASE: []}
        self.seconds: dict[str, float] = {}
        self.drawn: dict[str, dict[str, Drawn]] = {name: {} for name in (BASE, *LORAS)}  # by group

    def steps(self) -> list[Step]:
        """Draw, then train and draw twice; a few pictures come first, so that there is something to see."""
        first, *others = PROMPTS
        show_base = partial(self._show, BASE)
        steps = [
            Step("Draw old digits with the base model", partial(self._draw, BASE, [first]), show_base),
            Step("Draw everything else with it", partial(self._draw, BASE, others), show_base),
        ]
        for chain, name in enumerate(LORAS):
            train, draw_all = partial(self._train, name), partial(self._draw, name, list(PROMPTS))
            steps += [
                Step(f"Train the {name}", train, partial(self._note, name), chain),
                Step(f"Draw with the {name}", draw_all, partial(self._show, name), chain),
            ]
        return steps

    @cached_property
    def _judge(self) -> DigitsJudge:
        # One that knows glyphs also for digits: it must be able to say that a digit became a glyph.
        return DigitsJudge(glyphs=True)

    def _train(self, name: str) -> float:
        started = time.perf_counter()
        folder = train_subject(self.output_dir, name.replace(" ", "_"), GLYPH, LORAS[name])
        self.loras[name] = [folder]
        return time.perf_counter() - started

    def _draw(self, name: str, groups: list[str]) -> dict[str, Drawn]:
        pipeline = load_with_loras(self.loras[name])
        return {group: draw_group(pipeline, group, self._judge) for group in groups}

    def _note(self, name: str, seconds: float) -> Findings:
        self.seconds[name] = seconds
        return Findings()

    def _show(self, name: str, drawn: dict[str, Drawn]) -> Findings:
        self.drawn[name].update(drawn)
        complete = {n: groups for n, groups in self.drawn.items() if len(groups) == len(PROMPTS)}
        if BASE not in complete:
            return Findings(galleries(self.drawn))
        self.output_dir.mkdir(parents=True, exist_ok=True)
        rows = table_rows(complete, self.seconds)
        write_atomically(self.output_dir / "table.md", table(list(_HEADER), rows) + "\n")
        images = {n: {g: d.images for g, d in groups.items()} for n, groups in complete.items()}
        subject_sheet(images, _ROWS).save(self.output_dir / "sheet.png")
        figures = Table("How much was learnt and kept", _TABLE_TEXT, _HEADER, rows)
        return Findings([figures, *galleries(self.drawn)], sentence(complete))


_ROWS = {"glyph": (f'"{INSTANCE_PROMPTS[GLYPH]}"', 1), "known": ("old digits", 2), "held_out": ("unseen pairs", 1)}
_HEADER = ("model", "new glyph", "old digits", "held-out prompts", "pixel drift", "training")
_TABLE_TEXT = (
    f"Shares of pictures that the judge reads as asked: {len(PROMPTS['glyph'])} of the new glyph, "
    f"{len(PROMPTS['known'])} of old digits, {len(PROMPTS['held_out'])} of held-out pairs and wording. "
    "The judge knows ten digits and three glyphs. Drift: mean change of an old digit's pixels, from 0 to 1."
)


class Drawn(NamedTuple):
    """One group's pictures by one model."""

    images: list[Image.Image]
    reading: Reading
    right: list[bool]

    @property
    def share(self) -> float:
        """Of pictures that are right."""
        return sum(self.right) / len(self.right)


def draw_group(pipeline: StableDiffusionPipeline, group: str, judge: DigitsJudge) -> Drawn:
    """Draw the prompts of a group and read the pictures."""
    title = _GALLERIES[group].title.lower()
    images = draw(pipeline, PROMPTS[group], seed=SEEDS[group], description=title)
    reading = judge.read(images)
    if group == "glyph":
        right = [name == GLYPH for name in reading.names]
    else:
        asked = [read_prompt(prompt) for prompt in PROMPTS[group]]
        read = zip(reading.colors, reading.names, strict=True)
        right = [pair == wanted for pair, wanted in zip(read, asked, strict=True)]
    return Drawn(images, reading, right)


def table_rows(drawn: dict[str, dict[str, Drawn]], seconds: dict[str, float]) -> list[list[str]]:
    """One row per model: shares, drift from the base's old digits, seconds of training."""
    rows, known = [], to_pixels(drawn[BASE]["known"].images)
    for name, groups in drawn.items():
        moved = pixel_drift(known, to_pixels(groups["known"].images)).mean().item()
        shares = [f"{groups[group].share:.3f}" for group in ("glyph", "known", "held_out")]
        took = f"{seconds[name]:.0f} s" if name in seconds else "-"
        rows.append([name, *shares, f"{moved:.4f}", took])
    return rows


def sentence(drawn: dict[str, dict[str, Drawn]]) -> str:
    """What all three models together say; empty before."""
    if not all(name in drawn for name in LORAS):
        return ""
    plain, quiet = (drawn[name] for name in LORAS)
    return (
        f"Of {len(PROMPTS['glyph'])} pictures of the new word, {sum(plain['glyph'].right)} read as a "
        f"{GLYPH} with the plain LoRA and {sum(quiet['glyph'].right)} with the null-space LoRA. Of "
        f"{len(PROMPTS['known'])} old digits the plain LoRA keeps {sum(plain['known'].right)}, the "
        f"null-space LoRA {sum(quiet['known'].right)}."
    )


def galleries(drawn: dict[str, dict[str, Drawn]]) -> list[Gallery]:
    """One gallery per group of prompts that the base has drawn, all models side by side."""
    found = []
    for group, (title, text, stride, count) in _GALLERIES.items():
        indices = range(0, len(PROMPTS[group]), stride)[:count]
        if group in drawn[BASE]:
            comparisons = [
                Comparison(
                    PROMPTS[group][index],
                    SEEDS[group] + index,
                    {
                        name: _picture(name, groups[group], group, index)
                        for name, groups in drawn.items()
                        if group in groups
                    },
                )
                for index in indices
            ]
            found.append(Gallery(title, text, comparisons))
    return found


def _picture(name: str, drawn: Drawn, group: str, index: int) -> Picture:
    word, color = drawn.reading.names[index], drawn.reading.colors[index]
    if group != "glyph":
        return Picture([drawn.images[index]], f"{color} {word}", drawn.right[index])
    # Nothing was asked of the base model by a word that means nothing to it.
    right = None if name == BASE else drawn.right[index]
    return Picture([drawn.images[index]], word, right)


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """Pictures as `(n, 3, 32, 32)` in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
