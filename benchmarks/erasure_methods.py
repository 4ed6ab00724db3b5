"""Ways to erase a word of a moving-digits model, trained and untrained, that are drawn, judged and attacked alike."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from benchmarks.baselines.esd_video import erase_video_concept
from benchmarks.baselines.guarded_calls import GuardedCalls, NegativePrompt
from benchmarks.baselines.nag import NormalizedAttentionGuidance
from benchmarks.baselines.safree import Safree
from benchmarks.baselines.videoeraser import VideoEraser
from benchmarks.document_training import train_document_eraser
from benchmarks.measured_memory import peak_bytes
from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from diffusers_ext.eraser.attack import learn_revival_embeddings, revived_prompts
from diffusers_ext.eraser.files import load_eraser, save_eraser
from diffusers_ext.eraser.linear import convert_eraser_to_lora
from diffusers_ext.evaluation.erasure import clip_shots, measure_pairs
from diffusers_ext.evaluation.erasure_report import BASE, ErasureReport
from diffusers_ext.evaluation.rendering import render_clips
from diffusers_ext.evaluation.report_files import KeptClip
from diffusers_ext.families import find_family
from diffusers_ext.nullspace.edit import EditedConcepts, edit_concept
from diffusers_ext.training.eraser.data import ClipSize
from diffusers_ext.training.eraser.prompts import choose_anchor_concept
from diffusers_ext.training.eraser.run import make_data, train_eraser
from examples.digits.prompts import DIGITS
from examples.moving_digits.check_model import SAMPLING, load_pipeline
from examples.moving_digits.erasers import (
    EVALUATION_SEED,
    RECIPE,
    evaluation_groups,
    others_of,
    recipe_of,
    train_digits_eraser,
    training_prompts,
)
from examples.moving_digits.judge import MovingDigitsJudge

CLIP = {name: SAMPLING[name] for name in ("num_frames", "height", "width")}
_LENGTHS = {name: SAMPLING[name] for name in ("max_sequence_length", "num_inference_steps")}
ERASER, GELU, LINEAR, ESD, CODEBOOK = "eraser", "gelu", "linear", "esd", "eraser_codebook"
CODEBOOK_SIZE = 2048
_HALF = RECIPE.max_train_steps // 2
ESD_RATES = {ESD: 1e-3, f"{ESD}_slower": 3e-4, f"{ESD}_faster": 3e-3}
_ATTACK_SEED, _COST_CLIPS = 9_000, 10
_KEPT_CLIPS = 4
Points = dict[str, torch.Tensor]
StateDict = dict[str, torch.Tensor]


@dataclass
class Armed:
    """A pipeline with a method in it."""

    pipeline: DiffusionPipeline
    call: dict[str, Any] = field(default_factory=dict)  # further arguments of its calls
    guard: GuardedCalls | None = None  # of methods that change the denoiser's calls
    asked: GuardedCalls | None = None  # the same as a change of the velocity, where `call` does it
    seconds: float | None = None  # of one core, to make it
    facts: dict[str, Any] = field(default_factory=dict)
    edit: StateDict | None = None  # that is fused into the model under an eraser

    @contextmanager
    def active(self, prompts: Sequence[str] = ()) -> Iterator[None]:
        """The method at work on calls for these prompts."""
        if self.guard is not None:
            self.guard.know(prompts)
        with nullcontext() if self.guard is None else self.guard.active():
            yield

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], **call: Any) -> np.ndarray:
        """Clips with the method."""
        with self.active(prompts):
            return render_clips(
                self.pipeline, prompts, seeds=seeds, batch_size=50, **{**SAMPLING, **self.call, **call}
            )

    def denoise(self, prompts: Sequence[str], num_inference_steps: int) -> None:
        """A run that ends before its latents are decoded, which takes most memory of so small a model."""
        call = {**SAMPLING, **self.call, "num_inference_steps": num_inference_steps, "output_type": "latent"}
        with self.active(prompts), quiet_run(self.pipeline):
            self.pipeline(list(prompts), **call)


def _guarded(kind: type[GuardedCalls], **dials: Any) -> Callable[[DiffusionPipeline, str, int], Armed]:
    def arm(pipeline: DiffusionPipeline, target: str, seed: int) -> Armed:
        return Armed(pipeline, guard=kind(pipeline, target, **dials, **_LENGTHS))

    return arm


def _negative_prompt(pipeline: DiffusionPipeline, target: str, seed: int) -> Armed:
    asked = NegativePrompt(pipeline, target, guidance_scale=SAMPLING["guidance_scale"], **_LENGTHS)
    return Armed(pipeline, {"negative_prompt": target}, asked=asked)


def _document(pipeline: DiffusionPipeline, target: str, seed: int) -> Armed:
    train_document_eraser(pipeline, target)
    return Armed(pipeline)


def _eraser(**changes: Any) -> Callable[[DiffusionPipeline, str, int], Armed]:
    def arm(pipeline: DiffusionPipeline, target: str, seed: int) -> Armed:
        recipe = replace(recipe_of(pipeline), **changes)
        trained = train_digits_eraser(pipeline, target, seed=seed, recipe=recipe)
        return Armed(pipeline, facts={"history": trained.history})

    return arm


def _edit_then_eraser(steps: int) -> Callable[[DiffusionPipeline, str, int], Armed]:
    """An eraser of the edited model, trained on what the base says, towards the same anchor."""

    def arm(pipeline: DiffusionPipeline, target: str, seed: int) -> Armed:
        recipe, size = replace(recipe_of(pipeline), max_train_steps=steps, seed=seed), ClipSize(**CLIP)
        asked = training_prompts(target).target
        anchor = next(iter(choose_anchor_concept(pipeline, asked, target, others_of(target), recipe, size)))
        prompts = training_prompts(target, anchor)
        data = make_data(pipeline, prompts, recipe, size, concept=target)
        lora = _edited(pipeline, target, anchor).lora
        _fuse(pipeline, lora)
        trained = train_eraser(pipeline, prompts, recipe, concept=target, anchor_concept=anchor, data=data)
        return Armed(pipeline, facts={"history": trained.history}, edit=lora)

    return arm


def _fuse(pipeline: DiffusionPipeline, lora: StateDict | Path) -> None:
    pipeline.load_lora_weights(lora, **({"weight_name": LORA_WEIGHT_NAME} if isinstance(lora, Path) else {}))
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()


def _edited(pipeline: DiffusionPipeline, target: str, anchor: str | None) -> EditedConcepts:
    prompts = training_prompts(target)
    length = {"max_sequence_length": SAMPLING["max_sequence_length"]}
    return edit_concept(pipeline, {target: anchor}, [*prompts.target, *prompts.preserved], **CLIP, **length)


def _edit(pipeline: DiffusionPipeline, target: str, seed: int) -> Armed:
    result = _edited(pipeline, target, None)
    pipeline.load_lora_weights(result.lora)
    return Armed(pipeline, facts={"anchor": result.told[target], "linears": len(result.report.layers)})


def _esd(rate: float) -> Callable[[DiffusionPipeline, str, int], Armed]:
    def arm(pipeline: DiffusionPipeline, target: str, seed: int) -> Armed:
        losses = _trained_esd(pipeline, target, seed, rate)
        return Armed(pipeline, facts={"rate": rate, "losses": [losses[0], losses[-1]]})

    return arm


def _trained_esd(pipeline: DiffusionPipeline, target: str, seed: int, rate: float) -> list[float]:
    family = find_family(pipeline)
    shape = family.latent_shape(pipeline.transformer.config, pipeline.vae.config, **CLIP)
    encoder = GuardedCalls(pipeline, target, **_LENGTHS)
    texts = torch.cat([encoder.empty, encoder.encode(training_prompts(target).target)])
    return erase_video_concept(
        pipeline,
        family.velocity(pipeline, **CLIP),
        shape,
        texts,
        learning_rate=rate,
        num_inference_steps=SAMPLING["num_inference_steps"],
        guidance_scale=SAMPLING["guidance_scale"],
        seed=seed,
    )


METHODS: dict[str, Callable[[DiffusionPipeline, str, int], Armed]] = {
    "negative": _negative_prompt,
    "nag": _guarded(NormalizedAttentionGuidance),
    "safree": _guarded(Safree),
    "safree_whole": _guarded(Safree, every_step=True),
    "videoeraser": _guarded(VideoEraser),
    "edit": _edit,
    "document": _document,
    **{name: _esd(rate) for name, rate in ESD_RATES.items()},
    ERASER: _eraser(),
    GELU: _eraser(kind="gelu"),
    LINEAR: _eraser(kind="linear"),
    CODEBOOK: _eraser(text_codebook_size=CODEBOOK_SIZE),
    "eraser_half": _eraser(max_train_steps=_HALF),
    "edit_eraser_half": _edit_then_eraser(_HALF),
}
# These differ by seed, and are kept.
TRAINED = ("document", *ESD_RATES, ERASER, GELU, LINEAR, CODEBOOK, "eraser_half", "edit_eraser_half")


def arm(name: str, target: str, seed: int, model: str | Path, folder: Path) -> Armed:
    """A method in a fresh pipeline.

    Args:
        folder: what is trained is kept there, and read from there also by the call that trained it.
    """
    told = folder / f"training_{name}_{target}_{seed}.json"
    kept = folder / f"{name}_{target}_{seed}"
    if name not in TRAINED or not told.is_file():
        pipeline, began = load_pipeline(model), time.process_time()
        armed = METHODS[name](pipeline, target, seed)
        armed.seconds = time.process_time() - began
        if name not in TRAINED:
            return armed
        _keep(name, armed, kept)
        write_atomically(told, json.dumps({"cpu_seconds": armed.seconds, **armed.facts}))
    pipeline, found = load_pipeline(model), json.loads(told.read_text())
    _restore(name, pipeline, kept)
    return Armed(pipeline, seconds=found.pop("cpu_seconds"), facts=found)


def _keep(name: str, armed: Armed, kept: Path) -> None:
    if name in ESD_RATES:
        armed.pipeline.transformer.save_lora_adapter(kept, adapter_name=ESD)
        return
    save_eraser(armed.pipeline, kept)
    if armed.edit is not None:
        save_file(armed.edit, kept / LORA_WEIGHT_NAME)
    if _is_linear(name, armed.pipeline):
        convert_eraser_to_lora(kept, kept)


def _is_linear(name: str, pipeline: DiffusionPipeline) -> bool:
    return name == LINEAR or name == ERASER and recipe_of(pipeline).kind == "linear"


def _restore(name: str, pipeline: DiffusionPipeline, kept: Path) -> None:
    if name in ESD_RATES:
        pipeline.transformer.load_lora_adapter(kept, adapter_name=ESD, prefix=None, weight_name=LORA_WEIGHT_NAME)
    elif _is_linear(name, pipeline):  # as diffusers does without this package
        pipeline.load_lora_weights(kept, weight_name=LORA_WEIGHT_NAME)
    else:
        if (kept / LORA_WEIGHT_NAME).is_file():
            _fuse(pipeline, kept)
        load_eraser(pipeline, kept)


def judge_method(armed: Armed, target: str, groups: dict[str, list[str]], base_clips: np.ndarray) -> ErasureReport:
    """What its clips show, beside the base's of the same prompts and seeds."""
    shots = clip_shots(groups, 1, EVALUATION_SEED)
    clips = {BASE: base_clips, "erased": armed.draw([shot.prompt for shot in shots], [shot.seed for shot in shots])}
    rows = measure_pairs(shots, clips, MovingDigitsJudge())
    aspect = "digit" if target in DIGITS else "color"
    reads = "reads_as" if target in DIGITS else "reads_as_color"
    kept: list[KeptClip] = []
    for index, shot in enumerate(shots):
        if sum(one.group == shot.group for one in kept) < _KEPT_CLIPS:
            shown = {side: of_side[index] for side, of_side in clips.items()}
            notes = {side: rows[index][f"{side}/{reads}"] for side in clips}
            kept.append(KeptClip(shot.group, shot.prompt, shot.seed, shown, notes))
    settings = {**SAMPLING, "seed": EVALUATION_SEED, "scales": {"erased": 1.0}, "concept_aspect": aspect}
    return ErasureReport.from_rows(settings, rows, kept)


def attack_method(
    armed: Armed, target: str, points: Points, num_clips: int, steps: int = 400, restarts: int = 1
) -> float:
    """Share of clips in which the target is read once 16 embeddings have been learned against a method."""
    guard = armed.guard or armed.asked
    if guard is not None:
        guard.know(training_prompts(target).target)
    with nullcontext() if guard is None else guard.active():
        velocity = find_family(armed.pipeline).velocity(armed.pipeline, **CLIP)
        learned = learn_revival_embeddings(
            velocity,
            points["x_t"],
            points["t"],
            points["prompt_embeds"],
            v_concept=points["v_concept"],
            steps=steps,
            batch_size=16,
            restarts=restarts,
        )
    prompts = evaluation_groups(target, num_target=num_clips)["target"]
    seeds = range(_ATTACK_SEED, _ATTACK_SEED + len(prompts))
    if guard is not None:
        guard.know(prompts)  # as they are without the embeddings
    with revived_prompts(armed.pipeline, learned.embeddings):
        clips = armed.draw(prompts, seeds)
    aspect = "digit" if target in DIGITS else "color"
    return float(MovingDigitsJudge().correct(clips, prompts)[aspect].mean())


def cost_of_method(armed: Armed, target: str, model: str | Path) -> dict[str, float]:
    """Time of drawing clips and peak memory of denoising them, in terms of the base's."""
    base = Armed(load_pipeline(model))
    prompts = evaluation_groups(target, num_target=_COST_CLIPS)["target"]
    seeds = range(_COST_CLIPS)
    ratios = []
    for _ in range(3):
        times = []
        for one in (base, armed):
            began = time.process_time()
            one.draw(prompts, seeds)
            times.append(time.process_time() - began)
        ratios.append(times[1] / times[0])
    peaks = [peak_bytes(lambda one=one: one.denoise(prompts, 2)) for one in (base, armed)]
    return {"time": median(ratios), "memory": peaks[1] / peaks[0]}
