"""Training steps of an eraser on models of any size: this project's, and the design document's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel, WanPipeline, WanTransformer3DModel

from benchmarks.document_recipe import DocumentRecipe, DocumentTexts, document_loss, noised_randomness
from diffusers_ext.eraser.concept_masks import mask_to_latents
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.teacher.runs import EraserText
from diffusers_ext.families import find_family
from diffusers_ext.training.eraser.data import ClipSize, EraserData
from diffusers_ext.training.eraser.run import add_eraser, make_step
from examples.moving_digits.check_model import WAN_DIR, load_pipeline

ETA = 1.0


class Subject:
    """A pipeline, the clips it is asked for, and text and samples without meaning.

    Args:
        name: in tables.
        pipeline: in float32 on the CPU.
        size: of the clips.
        rank: of the eraser.
        rows: target rows of a step, and as many preserved rows.
        gradient_checkpointing: in all steps.
    """

    def __init__(
        self,
        name: str,
        pipeline: CogVideoXPipeline | WanPipeline,
        size: ClipSize,
        rank: int,
        rows: int,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.name, self.pipeline, self.size, self.rank, self.rows = name, pipeline, size, rank, rows
        self.family, config = find_family(pipeline, "eraser"), pipeline.transformer.config
        self.latents = self.family.latent_shape(config, pipeline.vae.config, *size)
        self.grid = self.family.token_grid(config, self.latents)
        self.gradient_checkpointing = gradient_checkpointing
        tokens = self.family.prompt_length(pipeline)
        self.text = torch.randn(3, tokens, self.family.text_width(config))
        self.concept = torch.zeros(3, tokens, dtype=torch.bool)
        self.concept[:, 1] = True

    @property
    def weights(self) -> int:
        """Bytes of the transformer."""
        return sum(p.nbytes for p in self.pipeline.transformer.parameters())

    def student(self, recipe: EraserTraining) -> CogVideoXPipeline | WanPipeline:
        """A copy of the pipeline with an eraser that trains."""
        pipeline = copy.copy(self.pipeline)
        pipeline.transformer = copy.deepcopy(self.pipeline.transformer)
        self.parameters = add_eraser(pipeline.transformer, recipe)
        if self.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        pipeline.transformer.train()
        return pipeline

    def batch(self, with_masks: bool) -> dict[str, Any]:
        """Teacher samples as the training's data loader gives them."""
        t = torch.arange(self.rows) * 100 + 50
        prompts = torch.arange(self.rows) % len(self.text)

        def latents() -> torch.Tensor:
            return torch.randn(self.rows, *self.latents)

        target = {"x_t": latents(), "t": t, "prompt": prompts}
        target |= {"v_concept": latents(), "v_anchor": latents()}
        if with_masks:
            target["mask"] = torch.rand(self.rows, *self.grid)
        preserved = {"x_t": latents(), "t": t, "prompt": prompts, "velocity": latents()}
        return {"target": target, "preserved": preserved}


def digits_subject() -> Subject:
    """The bundled moving-digits model at its own size."""
    return Subject("moving digits", load_pipeline(), ClipSize(9, 16, 16), rank=32, rows=4)


def medium_subject() -> Subject:
    """A random model of 8 blocks and width 512, with 300 video tokens."""
    pipeline = load_pipeline()
    config = {**pipeline.transformer.config, "num_layers": 8, "time_embed_dim": 512}
    config |= {"num_attention_heads": 8, "attention_head_dim": 64}
    config |= {"sample_height": 10, "sample_width": 10}
    torch.manual_seed(0)
    pipeline.transformer = CogVideoXTransformer3DModel.from_config(config)
    return Subject("8 x 512", pipeline, ClipSize(9, 40, 40), rank=64, rows=1)


def wan_subject() -> Subject:
    """The bundled Wan at its own size."""
    return Subject("moving digits, Wan", load_pipeline(WAN_DIR), ClipSize(9, 16, 16), rank=32, rows=4)


def medium_wan_subject() -> Subject:
    """A random Wan of 8 blocks and width 512, with 300 video tokens."""
    pipeline = load_pipeline(WAN_DIR)
    config = {**pipeline.transformer.config, "num_layers": 8, "ffn_dim": 2048}
    config |= {"num_attention_heads": 8, "attention_head_dim": 64}
    torch.manual_seed(0)
    pipeline.transformer = WanTransformer3DModel.from_config(config)
    return Subject("8 x 512, Wan", pipeline, ClipSize(9, 80, 80), rank=64, rows=1)


def training_step(subject: Subject, *, live_teacher: bool = False, localization: bool = False) -> Callable[[], None]:
    """A function that makes one step of this project's training.

    Args:
        subject: model and sizes.
        live_teacher: the teacher is asked in the step, not before it.
        localization: with masks and the loss that needs them.
    """
    recipe = EraserTraining(
        rank=subject.rank,
        train_batch_size=subject.rows,
        negative_guidance=ETA,
        localization_weight=1.0 if localization else 0.0,
        latents_source="noise" if live_teacher else "trajectory",
    )
    pipeline = subject.student(recipe)
    text = EraserText(subject.text, subject.text, subject.text, subject.text[0])
    data = EraserData(text, subject.concept if localization else None, None, subject.size)
    step = make_step(pipeline, data, recipe, torch.device("cpu"))
    optimizer = torch.optim.AdamW(subject.parameters)
    batch = subject.batch(localization)
    if live_teacher:
        batch = {"x_0": torch.randn(subject.rows, *subject.latents)}

    def run() -> None:
        losses = step(pipeline.transformer, batch, torch.Generator().manual_seed(0))
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def document_step(subject: Subject) -> Callable[[], None]:
    """A function that makes one step of the design document's training, on as many clips."""
    student = subject.student(EraserTraining(rank=subject.rank))
    original, pipeline = (subject.family.velocity(p, *subject.size) for p in (subject.pipeline, student))
    texts = DocumentTexts(*(subject.text[i : i + 1] for i in range(3)), token_mask=subject.concept[:1])
    optimizer = torch.optim.AdamW(subject.parameters)

    def to_latents(mask: torch.Tensor) -> torch.Tensor:
        return mask_to_latents(mask[..., 0].unflatten(1, subject.grid), subject.latents)

    def run() -> None:
        generator = torch.Generator().manual_seed(0)
        t = torch.randint(1000, (subject.rows,), generator=generator)
        shape = (subject.rows, *subject.latents)
        x_t = noised_randomness(subject.family, student.scheduler, shape, t, generator)
        loss = document_loss(original, pipeline, texts, x_t, t, to_latents, DocumentRecipe())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run
