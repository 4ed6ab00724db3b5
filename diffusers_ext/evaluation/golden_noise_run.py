"""The drawing of an evaluation of golden noise: standard, golden and candidate noises, batch by batch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from diffusers_ext.evaluation.golden_noise_subjects import Refine
from diffusers_ext.evaluation.noise_figures import STANDARD, NoiseFigures
from diffusers_ext.evaluation.noise_rendering import draw_from_noise, unit_noise
from diffusers_ext.evaluation.noise_summary import best_of_name
from diffusers_ext.evaluation.rendering import Sampling, Shot, image_seed, to_images
from diffusers_ext.evaluation.run_cost import RunCost
from diffusers_ext.golden_noise.conditioning import TextConditioning, encode_prompts
from diffusers_ext.rewards.reward import Reward, checked_scores


class GoldenNoiseRun:
    """Draws, times, scores and measures all sides of every picture.

    Args:
        pipeline: the plain pipeline.
        rewards: the first chooses among candidates and is timed.
        shape: `(channels, height, width)` of the noise.
        best_of: random noises per picture, the standard one among them.
        images_dir: folder of all pictures, one folder a side; none are kept whole when `None`.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        subjects: Mapping[str, Refine],
        rewards: Mapping[str, Reward],
        sampling: Sampling,
        shape: tuple[int, int, int],
        best_of: int,
        figures: NoiseFigures,
        images_dir: str | os.PathLike | None = None,
    ) -> None:
        self.images_dir = None if images_dir is None else Path(images_dir)
        self.pipeline, self.subjects, self.rewards = pipeline, subjects, rewards
        self.sampling, self.shape, self.best_of = sampling, shape, best_of
        self.figures, self.device = figures, pipeline._execution_device
        self.cost = RunCost(self.device)
        self.candidates: dict[str, list[torch.Tensor]] = {label: [] for label in rewards}

    def draw_all(self, shots: Sequence[Shot], batch_size: int, show_progress: bool) -> None:
        """Draw, score and measure all pictures."""
        self._check_subjects(shots[:1])
        with tqdm(total=len(shots), desc="evaluation", disable=not show_progress) as bar:
            for number, start in enumerate(range(0, len(shots), batch_size)):
                batch = shots[start : start + batch_size]
                self._draw_batch(batch, number)
                bar.update(len(batch))

    def _draw_batch(self, shots: Sequence[Shot], number: int) -> None:
        prompts = [shot.prompt for shot in shots]
        text, noise = self._encode(shots), unit_noise(shots, self.shape)
        placed = noise.to(self.device)
        images: dict[str, list[Image.Image]] = {}
        noises: dict[str, torch.Tensor] = {}
        sides = self.figures.sides
        turn = number % len(sides)  # no side is always the first, or the one after a slow one
        for side in [*sides[turn:], *sides[:turn]]:
            noises[side] = noise
            if side != STANDARD:
                with self.cost.measure(f"refine {side}", len(shots)):
                    golden = self._refine(side, placed, text)
                noises[side] = golden.cpu()
            images[side] = self._draw(shots, noises[side])
        self._save(shots, images)
        scores = {side: self._score(images[side], prompts) for side in sides}
        if self.best_of > 1:
            best = best_of_name(self.best_of)
            scores[best] = self._best_of(shots, scores[STANDARD])
        self.figures.add(shots, images, noises, scores)

    def _save(self, shots: Sequence[Shot], images: Mapping[str, Sequence[Image.Image]]) -> None:
        """Write `<side>/<number>_seed_<seed>.png`; numbers are those of the report's rows."""
        if self.images_dir is None:
            return
        for side, pictures in images.items():
            folder = self.images_dir / re.sub(r"[^\w.-]+", "_", side)
            folder.mkdir(parents=True, exist_ok=True)
            for number, (shot, picture) in enumerate(zip(shots, pictures, strict=True)):
                row = len(self.figures.rows) + number
                picture.save(folder / f"{row:05d}_seed_{shot.seed}.png")

    def _draw(self, shots: Sequence[Shot], noise: torch.Tensor) -> list[Image.Image]:
        with self.cost.measure("draw", len(shots)):
            pixels = draw_from_noise(self.pipeline, shots, self.sampling, noise)
        return to_images(pixels)

    def _check_subjects(self, shots: Sequence[Shot]) -> None:
        """Refine one noise with each; what does not fit is found before anything is drawn."""
        text = self._encode(shots)
        for side in self.subjects:
            self._refine(side, unit_noise(shots, self.shape).to(self.device), text)

    def _encode(self, shots: Sequence[Shot]) -> TextConditioning:
        prompts = [shot.prompt for shot in shots]
        return encode_prompts(self.pipeline, prompts, self.sampling.negative_prompt)

    @torch.no_grad()
    def _refine(self, side: str, noise: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        golden = self.subjects[side](noise, text)
        if golden.shape != noise.shape or not torch.isfinite(golden).all():
            raise ValueError(
                f"`refine` must give finite noise of shape {tuple(noise.shape)}, got "
                f"{tuple(golden.shape)}{'' if torch.isfinite(golden).all() else ' with NaN'} from "
                f"{side!r}."
            )
        return golden.float()

    def _score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, torch.Tensor]:
        first, *others = self.rewards
        with self.cost.measure("score", len(images)):
            scores = {first: checked_scores(self.rewards[first], images, prompts)}
        for label in others:
            scores[label] = checked_scores(self.rewards[label], images, prompts)
        return scores

    def _best_of(
        self, shots: Sequence[Shot], standard: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Scores of the candidate that the first reward likes best, `{reward: (n,)}`."""
        prompts = [shot.prompt for shot in shots]
        found = {label: [scores] for label, scores in standard.items()}
        for number in range(1, self.best_of):
            others = [
                shot._replace(
                    seed=image_seed(shot.seed, shot.prompt, shot.index, f"candidate-{number}")
                )
                for shot in shots
            ]
            images = self._draw(others, unit_noise(others, self.shape))
            for label, scores in self._score(images, prompts).items():
                found[label].append(scores)
        stacked = {label: torch.stack(columns, dim=1) for label, columns in found.items()}
        for label, scores in stacked.items():
            self.candidates[label].append(scores)
        chosen = stacked[next(iter(stacked))].argmax(dim=1, keepdim=True)
        return {label: scores.gather(1, chosen).flatten() for label, scores in stacked.items()}


def label_rewards(rewards: Reward | Sequence[Reward]) -> dict[str, Reward]:
    """Rewards by `"name version"`, in their order, one at least."""
    found = [rewards] if hasattr(rewards, "score") else list(rewards)
    if not found:
        raise ValueError("`rewards` must hold at least one reward, got none.")
    labelled: dict[str, Reward] = {}
    for reward in found:
        missing = [part for part in ("score", "name", "version") if not hasattr(reward, part)]
        if missing:
            raise TypeError(
                "`rewards` must hold objects with `score(images, prompts)`, `name` and `version`, "
                f"got {reward!r:.80} without {missing}."
            )
        label = f"{reward.name} {reward.version}"
        if label in labelled:
            raise ValueError(f"`rewards` must differ in name or version, got {label!r} twice.")
        labelled[label] = reward
    return labelled
