"""Whether golden noise helps, and what it costs: pictures from the same seeds with and without it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.evaluation import noise_summary
from diffusers_ext.evaluation.features import FeatureExtractor, PixelFeatures
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.evaluation.noise_summary import STANDARD, NoiseFigures, RunCost, best_of_name
from diffusers_ext.evaluation.paired_comparison import resampled_groups
from diffusers_ext.evaluation.rendering import (
    Sampling,
    Shot,
    check_counts,
    draw_from_noise,
    image_seed,
    latent_shape,
    pipeline_facts,
    shots_of,
    to_images,
    unit_noise,
    without_noise_model,
)
from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.first_prediction import first_prediction
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork
from diffusers_ext.golden_noise.noise_statistics import match_spectrum
from diffusers_ext.golden_noise.redenoise import encode_prompts, redenoise_sequence
from diffusers_ext.nullspace.prompts import check_prompts, unique
from diffusers_ext.rewards.reward import Reward, checked_scores

Refine = Callable[[torch.Tensor, TextConditioning], torch.Tensor]

_PROBES = 16  # weights of a fingerprint; a report is read by people
_FEATURE_SIZE = 64  # pixels a side of the default features
_RESERVED = ("standard", "best of", "score")  # other rows of the report


class RedenoisedTarget:
    """The re-denoised noise itself, which networks learn to predict; called like a network.

    Its spectrum is matched to the noise it came from, as a network's output is. The step of `redenoise` is repeated
    `repeats` times; `num_steps` sets its strength, `w1` and `w2` are the guidance on the way down and up.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        repeats: int = 1,
        *,
        num_steps: int = 10,
        w1: float = 5.5,
        w2: float = 1.0,
        legacy_inversion: bool = False,
    ) -> None:
        check_counts(repeats=repeats)
        self.pipeline, self.repeats = pipeline, repeats
        self.step = {"num_steps": num_steps, "w1": w1, "w2": w2, "legacy_inversion": legacy_inversion}

    @property
    def facts(self) -> dict[str, Any]:
        """What the evaluation's report says about it."""
        return {"repeats": self.repeats, **self.step}

    def __call__(self, noise: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        """Golden noise of unit `noise` `(batch, channels, height, width)`, float32."""
        sequence = redenoise_sequence(self.pipeline, noise, text, repeats=self.repeats, **self.step)
        return match_spectrum(sequence[:, -1], noise)


class NetworkRefiner:
    """A network called with a `TextConditioning`; `scale` 0 leaves the noise as it is, 1 is its output.

    A guard that reads the model's prediction needs the `pipeline`.
    """

    def __init__(
        self, network: GoldenNoiseNetwork, scale: float = 1.0, pipeline: DiffusionPipeline | None = None
    ) -> None:
        self.network, self.scale, self.pipeline = network, scale, pipeline

    @property
    def facts(self) -> dict[str, Any]:
        """What the evaluation's report says about it."""
        parameters = list(self.network.parameters())
        return {
            "class": type(self.network).__name__,
            "name_or_path": str(self.network.config.get("_name_or_path") or ""),
            "golden_noise_scale": self.scale,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
            "fingerprint": fingerprint(self.network, _PROBES),
        }

    def __call__(self, noise: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        """Golden noise of unit `noise` `(batch, channels, height, width)`, float32."""
        return self.network.refine(
            noise,
            text.prompt_embeds,
            attention_mask=text.attention_mask,
            pooled_prompt_embeds=text.pooled_prompt_embeds,
            scale=self.scale,
            predict=None if self.pipeline is None else first_prediction(self.pipeline, text),
        )


def name_subjects(
    refine: GoldenNoiseNetwork | Refine | Mapping[str, GoldenNoiseNetwork | Refine] | None,
    scale: float = 1.0,
    pipeline: DiffusionPipeline | None = None,
) -> dict[str, Refine]:
    """What is evaluated, by name (one alone is `"golden"`), all called as `refine(noise, text)`."""
    found = refine if isinstance(refine, Mapping) else {"golden": refine}
    if refine is None or not found:
        raise ValueError("`refine` must be a golden-noise network or a function of noise and text, got none.")
    subjects: dict[str, Refine] = {}
    for name, subject in found.items():
        if not name or "/" in name or name.startswith(_RESERVED):
            raise ValueError(
                f"`refine` must have names without '/' that do not start with one of {_RESERVED}, got {name!r}."
            )
        is_network = isinstance(subject, GoldenNoiseNetwork)
        if not is_network and not callable(subject):
            raise TypeError(
                "`refine` must hold golden-noise networks or functions of noise and text, got "
                f"{type(subject).__name__} for {name!r}."
            )
        subjects[name] = NetworkRefiner(subject, scale, pipeline) if is_network else subject
    return subjects


class GoldenNoiseRun:
    """Draws, times, scores and measures all sides of every picture; `shape` is that of the noise without its batch.

    The first of the rewards chooses among `best_of` random noises, the standard one among them, and is timed.
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
        self.pipeline, self.subjects, self.rewards = pipeline, subjects, rewards
        self.sampling, self.shape, self.best_of = sampling, shape, best_of
        self.figures, self.images_dir = figures, images_dir
        self.device = pipeline._execution_device
        self.cost = RunCost(self.device)
        self.candidates: dict[str, list[torch.Tensor]] = {label: [] for label in rewards}

    def draw_all(self, shots: Sequence[Shot], batch_size: int, show_progress: bool) -> None:
        """Draw, score and measure all pictures."""
        # What does not fit is found before anything is drawn.
        text, noise = self._encode(shots[:1]), unit_noise(shots[:1], self.shape).to(self.device)
        for side in self.subjects:
            self._refine(side, noise, text)
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
            folder = Path(self.images_dir, re.sub(r"[^\w.-]+", "_", side))
            folder.mkdir(parents=True, exist_ok=True)
            for number, (shot, picture) in enumerate(zip(shots, pictures, strict=True)):
                row = len(self.figures.rows) + number
                picture.save(folder / f"{row:05d}_seed_{shot.seed}.png")

    def _draw(self, shots: Sequence[Shot], noise: torch.Tensor) -> list[Image.Image]:
        with self.cost.measure("draw", len(shots)):
            pixels = draw_from_noise(self.pipeline, shots, self.sampling, noise)
        return to_images(pixels)

    def _encode(self, shots: Sequence[Shot]) -> TextConditioning:
        prompts = [shot.prompt for shot in shots]
        return encode_prompts(self.pipeline, prompts, self.sampling.negative_prompt)

    @torch.no_grad()
    def _refine(self, side: str, noise: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        golden = self.subjects[side](noise, text)
        if golden.shape != noise.shape or not torch.isfinite(golden).all():
            found = f"{tuple(golden.shape)}{'' if torch.isfinite(golden).all() else ' with NaN'}"
            raise ValueError(
                f"`refine` must give finite noise of shape {tuple(noise.shape)}, got {found} from {side!r}."
            )
        return golden.float()

    def _score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, torch.Tensor]:
        first, *others = self.rewards
        with self.cost.measure("score", len(images)):
            scores = {first: checked_scores(self.rewards[first], images, prompts)}
        for label in others:
            scores[label] = checked_scores(self.rewards[label], images, prompts)
        return scores

    def _best_of(self, shots: Sequence[Shot], standard: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Scores of the candidate that the first reward likes best, `{reward: (n,)}`."""
        prompts = [shot.prompt for shot in shots]
        found = {label: [scores] for label, scores in standard.items()}
        for number in range(1, self.best_of):
            others = [
                shot._replace(seed=image_seed(shot.seed, shot.prompt, shot.index, f"candidate-{number}"))
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


def evaluate_golden_noise(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    refine: GoldenNoiseNetwork | Refine | Mapping[str, GoldenNoiseNetwork | Refine] | None = None,
    rewards: Reward | Sequence[Reward],
    num_images_per_prompt: int = 1,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    golden_noise_scale: float = 1.0,
    best_of: int = 4,
    features: FeatureExtractor | None = None,
    batch_size: int = 8,
    sheet_prompts: int = 16,
    images_dir: str | os.PathLike | None = None,
    show_progress: bool = True,
) -> GoldenNoiseReport:
    """Draw every picture from its seed's noise and from what golden-noise networks make of it.

    All networks and targets share the standard pictures. Time is measured in the same batches, in changing order. The
    text is encoded outside of what is timed for golden noise: a golden-noise pipeline uses the embeddings it needs
    anyway. The pipeline is left as it was.

    Args:
        pipeline: draws; of a golden-noise pipeline its plain form.
        prompts: repetitions are dropped.
        refine: a network, or `refine(unit_noise, text)` with a `TextConditioning` that gives the golden noise (as
            `RedenoisedTarget`), on the pipeline's device; several by name; its own `noise_model` when `None`.
        rewards: one or several; the first decides what is best, the others are reported.
        seeds: seeds of every prompt's pictures, in place of `seed` and `num_images_per_prompt`.
        best_of: random noises per picture, the standard one among them, of which the first reward keeps the best; 1
            leaves that comparison out.
        features: for the distance of pictures of one prompt; small pixels when `None`.
        sheet_prompts: prompts of which the report keeps two seeds' pictures.
        images_dir: folder to write every picture to, `<side>/<row of the report>_seed_<seed>.png`.

    Raises:
        ValueError: prompts or networks are missing or do not fit, or pictures, noise or scores are not finite.
    """
    check_counts(num_images_per_prompt=num_images_per_prompt, best_of=best_of, batch_size=batch_size)
    prompts, labelled = unique(check_prompts(prompts)), label_rewards(rewards)
    refine = getattr(pipeline, "noise_model", None) if refine is None else refine
    subjects = name_subjects(refine, golden_noise_scale, pipeline)
    sampling = Sampling(num_inference_steps, guidance_scale, negative_prompt, height, width)
    shots = _shots(prompts, num_images_per_prompt, seed, seeds)
    shape = latent_shape(pipeline, height, width)
    figures = NoiseFigures(
        [STANDARD, *subjects], features or PixelFeatures(_FEATURE_SIZE), len(shots) // len(prompts), sheet_prompts
    )
    run = GoldenNoiseRun(pipeline, subjects, labelled, sampling, shape, best_of, figures, images_dir)
    with quiet_run(pipeline), without_noise_model(pipeline):
        run.draw_all(shots, batch_size, show_progress)
    settings = {
        **pipeline_facts(pipeline),
        "base_fingerprint": fingerprint(denoiser_of(pipeline), _PROBES),
        **vars(sampling),
        "latent_shape": list(shape),
        "threads": torch.get_num_threads(),
        "prompts": len(prompts),
        "num_images_per_prompt": len(shots) // len(prompts),
        "seed": seed if seeds is None else None,
        "seeds": None if seeds is None else list(seeds),
        "batch_size": batch_size,
        "best_of": best_of,
        "rewards": list(labelled),
        "features": type(figures.features).__name__,
        "subjects": {name: getattr(subject, "facts", {}) for name, subject in subjects.items()},
    }
    return _report(settings, run)


def _report(settings: dict[str, Any], run: GoldenNoiseRun) -> GoldenNoiseReport:
    figures, sides, best_of = run.figures, list(run.subjects), {}
    if run.best_of > 1:
        candidates = {label: torch.cat(parts) for label, parts in run.candidates.items()}
        best_of = noise_summary.best_of_summary(figures.rows, candidates, sides, run.cost)
        sides = [*sides, best_of_name(run.best_of)]
    grouped = resampled_groups(figures.rows) is not None
    return GoldenNoiseReport(
        {**settings, "resampled": "prompts" if grouped else "pairs"},
        noise_summary.compare_sides(figures.rows, sides, settings["rewards"]),
        best_of,
        noise_summary.noise_summary(figures),
        noise_summary.diversity_summary(figures),
        noise_summary.cost_summary(run.cost, figures.sides, settings["subjects"]),
        figures.rows,
        figures.kept,
    )


def _shots(prompts: Sequence[str], count: int, seed: int, seeds: Sequence[int] | None) -> list[Shot]:
    if seeds is None:
        return shots_of(prompts, count, seed)
    if not len(seeds) or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"`seeds` must be distinct and not negative, one at least, got {list(seeds)[:8]}.")
    return [Shot(prompt, index, s) for prompt in prompts for index, s in enumerate(seeds)]
