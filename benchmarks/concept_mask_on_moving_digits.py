"""How well masks find the digit in clips of moving digits, in terms of the best centred box.

python benchmarks/concept_mask_on_moving_digits.py

Real clips are encoded and noised; the model reads them with their prompts, where the digit's word is the concept,
"digit" the anchor. The true region is each token's share of pixels with ink. Soft masks are compared by sum(min) /
sum(max); hard ones (threshold chosen on other clips) with the tokens that have ink on a quarter of their pixels or
more. The boxes are chosen on the clips that are measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from diffusers_ext.core.concept_words import replace_concept
from diffusers_ext.eraser.batch import encode_video_prompts
from diffusers_ext.eraser.concept_masks import concept_head_weights, concept_mask
from diffusers_ext.eraser.concepts import concept_token_mask
from diffusers_ext.families.cogvideox import CogVideoXVelocity
from examples.moving_digits.check_model import load_pipeline
from examples.moving_digits.clips import CANVAS, NUM_FRAMES, MovingDigits, to_pixels
from examples.moving_digits.prompts import NEUTRAL_DIGIT, PROMPT_LENGTH, TEMPLATES

TIMESTEPS = (50, 150, 250, 400, 550, 700, 850, 950)
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
LEAST_INK = 0.25  # of a token's pixels, for the hard region
HEAD_CLIPS = 32


class Clips(NamedTuple):
    """Encoded clips with what the model is asked and where their digit is."""

    latents: torch.Tensor  # (clips, frames, channels, height, width)
    noise: torch.Tensor
    region: torch.Tensor  # (clips, frames', rows, columns) share of pixels with ink
    token_mask: torch.Tensor  # (clips, text) bool
    embeds: dict[str, torch.Tensor]  # of the prompts, of their anchors, of the empty prompt


class Measured(NamedTuple):
    """Figures of one kind of mask."""

    soft: float
    hard: float
    threshold: float | None
    area_under_curve: float
    soft_by_timestep: list[float]


def pool(ink: torch.Tensor) -> torch.Tensor:
    """Pixels `(clips, 9, 16, 16)` averaged over each token: 1, 4 and 4 frames of 4x4 pixels."""
    frames = torch.stack([part.mean(dim=1) for part in ink.split((1, 4, 4), dim=1)], dim=1)
    return F.avg_pool2d(frames, 4)


@torch.no_grad()
def draw_clips(pipeline: Any, count: int, seed: int) -> Clips:
    """Random real clips, encoded, each with a random template."""
    digits, generator = MovingDigits(), torch.Generator().manual_seed(seed)
    entries = [digits[i] for i in torch.randperm(len(digits), generator=generator)[:count].tolist()]
    pixels = np.stack([digits.clip(entry) for entry in entries])
    prompts, anchors, tokens = [], [], []
    for _, combination in entries:
        color, digit, direction = digits.combinations[combination]
        template = TEMPLATES[int(torch.randint(len(TEMPLATES), (), generator=generator))]
        prompts.append(template.format(color=color, digit=digit, direction=direction))
        anchors.append(replace_concept(prompts[-1], digit, NEUTRAL_DIGIT))
        tokens.append(concept_token_mask(pipeline.tokenizer, prompts[-1:], digit, PROMPT_LENGTH))
    latents = pipeline.vae.encode(to_pixels(pixels)).latent_dist.mean.transpose(1, 2)
    embeds = {
        name: encode_video_prompts(pipeline, texts)
        for name, texts in (("prompt", prompts), ("anchor", anchors), ("empty", [""] * count))
    }
    return Clips(
        latents * pipeline.vae.config.scaling_factor,
        torch.randn(latents.shape, generator=generator),
        pool(torch.from_numpy(pixels.max(axis=-1) > 0).float()),
        torch.cat(tokens),
        embeds,
    )


def soft_overlap(masks: torch.Tensor, region: torch.Tensor) -> float:
    """Mean over clips of `sum(min) / sum(max)`; masks `(clips, frames', rows, columns)` in [0, 1]."""
    least, most = torch.minimum(masks, region), torch.maximum(masks, region)
    return (least.flatten(1).sum(1) / most.flatten(1).sum(1)).mean().item()


def hard_overlap(masks: torch.Tensor, region: torch.Tensor, threshold: float) -> float:
    """Intersection over union of masks from the threshold on with tokens full of ink."""
    return soft_overlap((masks >= threshold).float(), (region >= LEAST_INK).float())


def area_under_curve(masks: torch.Tensor, region: torch.Tensor) -> float:
    """Chance that a token with ink has more mask than one without, mean over clips."""
    areas = []
    for mask, full in zip(masks.flatten(1), (region >= LEAST_INK).flatten(1), strict=True):
        inside, outside = mask[full][:, None], mask[~full][None]
        areas.append(((inside > outside).float() + 0.5 * (inside == outside).float()).mean().item())
    return float(np.mean(areas))


def measure(masks: list[torch.Tensor], region: torch.Tensor, threshold: float | None) -> Measured:
    """Figures of masks, a tensor a timestep; a box is one mask, for all of them."""
    soft = [soft_overlap(mask, region) for mask in masks]
    hard = [hard_overlap(mask, region, threshold) for mask in masks]
    areas = [area_under_curve(mask, region) for mask in masks]
    means = (float(np.mean(figures)) for figures in (soft, hard))
    return Measured(*means, threshold, float(np.mean(areas)), soft)


def centred_boxes() -> list[torch.Tensor]:
    """Boxes of every size in pixels, averaged over the tokens; `(1, frames', rows, columns)`."""
    distance = (torch.arange(CANVAS) + 0.5 - CANVAS / 2).abs()
    sides = [(distance <= size / 2).float() for size in range(2, CANVAS + 1)]
    return [pool((rows[:, None] * columns).expand(1, NUM_FRAMES, -1, -1)) for rows in sides for columns in sides]


def best_box(region: torch.Tensor) -> Measured:
    """The best soft and the best hard figure that any box reaches on these clips."""
    boxes = [box.expand_as(region) for box in centred_boxes()]
    best = max(boxes, key=lambda box: soft_overlap(box, region))
    hard = max(hard_overlap(box, region, level) for box in boxes for level in (0.01, 0.25, 0.5, 0.75))
    soft = soft_overlap(best, region)
    return Measured(soft, hard, None, area_under_curve(best, region), [soft] * len(TIMESTEPS))


class MaskMaker:
    """Every kind of mask of some clips at one timestep."""

    def __init__(self, pipeline: Any, calibration: Clips) -> None:
        self.pipeline = pipeline
        self.velocity = CogVideoXVelocity.from_pipeline(pipeline, NUM_FRAMES, CANVAS, CANVAS)
        few = Clips(*(part[:HEAD_CLIPS] for part in calibration[:4]), calibration.embeds)
        times = torch.tensor(TIMESTEPS).repeat(HEAD_CLIPS)[:HEAD_CLIPS]
        self.head_weights = concept_head_weights(
            self.velocity,
            self.noised(few, times),
            times,
            few.embeds["prompt"][:HEAD_CLIPS],
            few.embeds["anchor"][:HEAD_CLIPS],
            few.token_mask,
        )

    def noised(self, clips: Clips, t: torch.Tensor) -> torch.Tensor:
        """The clips' latents at timesteps `(clips,)`."""
        return self.pipeline.scheduler.add_noise(clips.latents, clips.noise, t)

    def kinds(self, clips: Clips) -> dict[str, dict[str, torch.Tensor]]:
        """Name of each kind -> what `concept_mask` is given for it."""
        anchor = {"anchor_embeds": clips.embeds["anchor"]}
        both = anchor | {"empty_embeds": clips.embeds["empty"]}
        heads = {"head_weights": self.head_weights}
        return {
            "attention, mean of all heads": {},
            "attention, weighted heads": heads,
            "velocity, concept - anchor": anchor,
            "velocity, also concept - empty prompt": both,
            "weighted heads x (concept - anchor)": heads | anchor,
            "weighted heads x both velocities": heads | both,
        }

    def make(self, clips: Clips) -> dict[str, list[torch.Tensor]]:
        """Soft masks of every kind, a tensor a timestep."""
        masks: dict[str, list[torch.Tensor]] = {name: [] for name in self.kinds(clips)}
        for timestep in tqdm(TIMESTEPS, desc="masks"):
            t = torch.full((len(clips.latents),), timestep)
            asked = (self.velocity, self.noised(clips, t), t, clips.embeds["prompt"])
            for name, given in self.kinds(clips).items():
                masks[name].append(concept_mask(*asked, clips.token_mask, **given))
        return masks


def best_threshold(masks: list[torch.Tensor], region: torch.Tensor) -> float:
    """The threshold with the largest mean overlap over the timesteps."""
    overlap: Callable[[float], float] = lambda level: sum(hard_overlap(mask, region, level) for mask in masks)
    return max(THRESHOLDS, key=overlap)


def main(input_args: list[str] | None = None) -> None:
    """Measure every kind of mask and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--calibration_clips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(input_args)
    pipeline = load_pipeline()
    calibration = draw_clips(pipeline, args.calibration_clips, args.seed + 1)
    clips = draw_clips(pipeline, args.clips, args.seed)
    maker = MaskMaker(pipeline, calibration)
    calibrated, masks = maker.make(calibration), maker.make(clips)
    figures = {"best centred box": best_box(clips.region)}
    for name, found in masks.items():
        threshold = best_threshold(calibrated[name], calibration.region)
        figures[name] = measure(found, clips.region, threshold)
    rows = [
        [name, f"{m.soft:.3f}", f"{min(m.soft_by_timestep):.3f}", f"{m.hard:.3f}"]
        + [f"{m.area_under_curve:.3f}", "" if m.threshold is None else f"{m.threshold:.2f}"]
        for name, m in figures.items()
    ]
    header = ["mask", "soft IoU", "worst timestep", "hard IoU", "AUC", "threshold"]
    results = {
        "arguments": vars(args),
        "timesteps": TIMESTEPS,
        "head_weights": maker.head_weights.tolist(),
        "figures": {name: m._asdict() for name, m in figures.items()},
    }
    text = table(header, rows)
    write_results("concept_mask_on_moving_digits", results, text)
    print(text)


if __name__ == "__main__":
    main()
