"""New glyphs as DreamBooth subjects: their pictures, what must survive them, and how they are trained."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.training.nullspace.run import main, parse_args
from examples.digits.check_model import MODEL_DIR, draw, load_pipeline
from examples.digits.judge import DigitsJudge
from examples.digits.pictures import GLYPHS, draw_glyphs, tint
from examples.digits.prompts import (
    HELD_OUT_PAIRS,
    HELD_OUT_TEMPLATE,
    RARE_TOKENS,
    TEMPLATES,
    TRAINING_PAIRS,
    prompt_pairs,
)
from examples.digits_flux2.pipeline import DigitsFlux2Pipeline

INSTANCE_PROMPTS = {glyph: f"a photo of the digit {token}" for glyph, token in zip(GLYPHS, RARE_TOKENS, strict=True)}
# Same steps, batch and schedule for both, so that only the method differs.
COMMON_FLAGS = ("--max_train_steps", "1000", "--train_batch_size", "8", "--lr_scheduler", "cosine")
NULL_SPACE_FLAGS = (
    "--directions", "generalized", "--rank", "1", "--adam_weight_decay", "1e-2", "--learning_rate", "1e-1",
)  # fmt: skip
PLAIN_FLAGS = ("--directions", "plain", "--rank", "8")


class SubjectFlags(NamedTuple):
    """How a model is taught a glyph: what both methods share, and what is a method's own."""

    common: tuple[str, ...] = COMMON_FLAGS
    null_space: tuple[str, ...] = NULL_SPACE_FLAGS
    plain: tuple[str, ...] = PLAIN_FLAGS


DIGITS_FLAGS = SubjectFlags()
FLUX2_FLAGS = SubjectFlags(
    COMMON_FLAGS,
    tuple(
        "--directions generalized --rank 2 --adam_weight_decay 1e-1 --num_inference_steps 10 "
        "--learning_rate 1e-2".split()
    ),
    ("--directions", "plain", "--rank", "8", "--scope", "all"),
)


def knowledge_prompts() -> list[str]:
    """The preserved set: every template with every pair that the base model was trained on."""
    return [prompt for template in TEMPLATES for prompt in prompt_pairs(template, TRAINING_PAIRS)]


def held_out_prompts() -> list[str]:
    """Knowledge that no statistics see: pairs and a template the base model was not trained on."""
    unseen = [p for template in TEMPLATES for p in prompt_pairs(template, HELD_OUT_PAIRS)]
    return unseen + prompt_pairs(HELD_OUT_TEMPLATE, (*TRAINING_PAIRS, *HELD_OUT_PAIRS))


def write_subject(folder: str | Path, glyph: str, *, count: int = 6, seed: int = 1) -> Path:
    """Write `count` white pictures of a glyph; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index, ink in enumerate(draw_glyphs(glyph, count, seed)):
        buffer = io.BytesIO()
        Image.fromarray(tint(ink, "white")).save(buffer, "PNG")
        # Whole at any time: two trainings of the same glyph may share the folder.
        write_atomically(folder / f"{glyph}_{index}.png", buffer.getvalue())
    return folder


def write_knowledge(path: str | Path) -> Path:
    """Write the preserved set as a prompts file; returns its path."""
    lines = ["# What the digits model was trained on", *knowledge_prompts()]
    write_atomically(path, "\n".join(lines) + "\n")
    return Path(path)


def train_subject(
    work_dir: str | Path,
    name: str,
    glyph: str,
    flags: Sequence[str],
    *,
    seed: int = 0,
    model: str | Path = MODEL_DIR,
    common: Sequence[str] = COMMON_FLAGS,
) -> Path:
    """Train a glyph by the training script, with `common` and `flags`; returns the folder with its LoRA."""
    work_dir = Path(work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    pictures = write_subject(work_dir / f"pictures_{glyph}_{seed}", glyph, seed=seed + 1)
    knowledge = write_knowledge(work_dir / "knowledge.txt")
    arguments = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": pictures,
        "instance_prompt": INSTANCE_PROMPTS[glyph],
        "knowledge_prompts": knowledge,
        "resolution": 32,
        "seed": seed,
        "output_dir": work_dir / name,
    }
    command = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    return main(parse_args([*command, *common, *flags]))


def load_with_loras(
    folders: Sequence[str | Path], model: str | Path = MODEL_DIR
) -> StableDiffusionPipeline | DigitsFlux2Pipeline:
    """A digits model with LoRAs loaded by stock diffusers, all active at once."""
    pipeline = load_pipeline(model)
    names = [f"subject_{index}" for index in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        pipeline.load_lora_weights(str(folder), adapter_name=name)
    if names:
        pipeline.set_adapters(names)
    return pipeline


def glyph_share(
    pipeline: StableDiffusionPipeline | DigitsFlux2Pipeline, glyph: str, judge: DigitsJudge, *, count: int, seed: int
) -> tuple[float, list[Image.Image]]:
    """Share of `count` pictures of the instance prompt that read as the glyph, and the pictures."""
    prompts = [INSTANCE_PROMPTS[glyph]] * count
    images = draw(pipeline, prompts, seed=seed, description=f"draw {glyph}")
    return float(np.mean([name == glyph for name in judge.read(images).names])), images
