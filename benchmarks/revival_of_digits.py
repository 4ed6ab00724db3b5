"""Try to bring an erased digit back: learned prompt embeddings, and plain fine-tuning on other digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch.utils.data import default_collate

from diffusers_ext.eraser.attack import learn_revival_embeddings, revived_prompts
from diffusers_ext.eraser.batch import encode_video_prompts
from diffusers_ext.eraser.files import load_eraser
from diffusers_ext.eraser.lora_finetuning import FinetunedLora, finetune_lora
from diffusers_ext.families import find_family
from diffusers_ext.training.eraser.data import ClipSize
from diffusers_ext.training.eraser.run import make_data
from examples.moving_digits.check_model import MODEL_DIR, draw, load_pipeline
from examples.moving_digits.clips import CANVAS, NUM_FRAMES, MovingDigits, to_pixels
from examples.moving_digits.erasers import RECIPE, evaluation_groups, training_prompts
from examples.moving_digits.judge import MovingDigitsJudge
from examples.moving_digits.prompts import COMBINATIONS, TEMPLATES

_SIZE = ClipSize(NUM_FRAMES, CANVAS, CANVAS)
_NUM_CLIPS, _SEED = 100, 9_000


def _read(pipeline: DiffusionPipeline, target: str) -> float:
    """Share of the target's clips in which it is read."""
    prompts = evaluation_groups(target, num_target=_NUM_CLIPS)["target"]
    clips = draw(pipeline, prompts, seed=_SEED)
    return float(MovingDigitsJudge().correct(clips, prompts)["digit"].mean())


def attack_points(pipeline: DiffusionPipeline, target: str, num_clips: int = 64) -> dict[str, torch.Tensor]:
    """Where attacks learn: `x_t`, `t`, `prompt_embeds` and `v_concept` of the base's own runs for the target."""
    few = replace(RECIPE, num_target_trajectories=num_clips, num_preserved_trajectories=1, seed=_SEED)
    data = make_data(pipeline, training_prompts(target), few, _SIZE)
    rows = default_collate(data.samples.parts["target"])
    found = {name: rows[name] for name in ("x_t", "t", "v_concept")}
    return {**found, "prompt_embeds": data.text.target[rows["prompt"]]}


def _learned_embeddings(pipeline: DiffusionPipeline, target: str) -> torch.Tensor:
    """16 embeddings that bring the target's velocities back along the base's own runs."""
    points = attack_points(pipeline, target)
    return learn_revival_embeddings(_SIZE.velocity(pipeline), **points, steps=400, batch_size=16).embeddings


@torch.no_grad()
def _other_clips(pipeline: DiffusionPipeline, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and prompts of 200 real clips of other digits."""
    digits = MovingDigits(tuple(c for c in COMBINATIONS if target not in c))
    picks = np.random.default_rng(_SEED).integers(0, len(digits), 200)
    entries = [digits[int(pick)] for pick in picks]
    pixels = to_pixels(np.stack([digits.clip(entry) for entry in entries]))
    latents = pipeline.vae.encode(pixels).latent_dist.mean.transpose(1, 2)
    prompts = []
    for index, (_, combination) in enumerate(entries):
        color, digit, direction = digits.combinations[combination]
        template = TEMPLATES[index % len(TEMPLATES)]
        prompts.append(template.format(color=color, digit=digit, direction=direction))
    embeds = encode_video_prompts(pipeline, prompts)
    offset, factor = find_family(pipeline, "eraser").latent_scale(pipeline.vae)
    return (latents - offset) * factor, embeds.detach()


def _finetuned(pipeline: DiffusionPipeline, target: str) -> FinetunedLora:
    latents, embeds = _other_clips(pipeline, target)
    return finetune_lora(_SIZE.velocity(pipeline), pipeline.scheduler, latents, embeds, steps=100, batch_size=16)


def measure_revival(eraser: Path, target: str, model: str | Path = MODEL_DIR) -> dict[str, Any]:
    """How often the target is read: erased, under learned embeddings, after fine-tuning."""
    pipeline = load_pipeline(model)
    base = _read(pipeline, target)
    load_eraser(pipeline, eraser)
    found = {"base": base, "erased": _read(pipeline, target)}
    with revived_prompts(pipeline, _learned_embeddings(pipeline, target)):
        found["16 learned embeddings"] = _read(pipeline, target)
    lora = _finetuned(pipeline, target)
    with lora:
        found["100 LoRA steps on other digits"] = _read(pipeline, target)
    return {**found, "shown": list(found), "lora_loss": [lora.losses[0], lora.losses[-1]]}
