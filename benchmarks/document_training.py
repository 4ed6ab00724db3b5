"""Train an eraser of the moving digits as the design document says, for comparison."""

from __future__ import annotations

import copy
import time

import torch
from accelerate import Accelerator
from diffusers import CogVideoXPipeline, WanPipeline
from torch.utils.data import Dataset

from benchmarks.document_recipe import DocumentRecipe, DocumentTexts, document_loss, noised_randomness
from diffusers_ext.eraser.batch import encode_video_prompts
from diffusers_ext.eraser.concept_masks import mask_to_latents
from diffusers_ext.eraser.concepts import concept_token_mask
from diffusers_ext.families import find_family
from diffusers_ext.training.eraser.run import add_eraser
from diffusers_ext.training.run.loop import LoopSettings, TrainingLoop
from examples.moving_digits.clips import CANVAS, NUM_FRAMES
from examples.moving_digits.erasers import RECIPE, others_of
from examples.moving_digits.prompts import PROMPT_LENGTH

_BATCH = 4  # the document's; rank, rate and steps are those of this project's recipe


class _Numbers(Dataset):
    """Its steps need no data."""

    def __len__(self) -> int:
        return _BATCH

    def __getitem__(self, index: int) -> int:
        return index


def _texts(pipeline: CogVideoXPipeline | WanPipeline, target: str) -> tuple[DocumentTexts, int]:
    """The bare concept, its negation, and every preserved concept by itself."""
    prompts = [target, f"not {target}", *others_of(target)]
    embeds = encode_video_prompts(pipeline, prompts).detach()
    tokens = concept_token_mask(pipeline.tokenizer, [target], target, PROMPT_LENGTH)
    return DocumentTexts(embeds[:1], embeds[1:2], embeds[2:], tokens), len(prompts) - 2


def train_document_eraser(pipeline: CogVideoXPipeline | WanPipeline, target: str) -> float:
    """Train; the eraser stays in the pipeline. Returns seconds."""
    original = copy.deepcopy(pipeline)
    size = (NUM_FRAMES, CANVAS, CANVAS)
    family = find_family(pipeline, "eraser")
    shape = family.latent_shape(pipeline.transformer.config, pipeline.vae.config, *size)
    grid = family.token_grid(pipeline.transformer.config, shape)
    texts, num_preserved = _texts(pipeline, target)
    parameters = add_eraser(pipeline.transformer, RECIPE)
    teacher, student = (family.velocity(p, *size) for p in (original, pipeline))

    def loss_function(model: torch.nn.Module, batch: list[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
        t = torch.randint(1000, (_BATCH,), generator=generator)
        x_t = noised_randomness(family, pipeline.scheduler, (_BATCH, *shape), t, generator)
        pick = int(torch.randint(num_preserved, (), generator=generator))
        chosen = DocumentTexts(texts.target, texts.negative, texts.preserved[pick : pick + 1], texts.token_mask)

        def to_latents(mask: torch.Tensor) -> torch.Tensor:
            return mask_to_latents(mask[..., 0].unflatten(1, grid), shape)

        loss = document_loss(teacher, student, chosen, x_t, t, to_latents, DocumentRecipe())
        return {"loss": loss}

    loop = TrainingLoop(
        Accelerator(cpu=True),
        pipeline.transformer,
        torch.optim.AdamW(parameters, RECIPE.learning_rate, weight_decay=0.01),
        _Numbers(),
        loss_function,
        LoopSettings(RECIPE.max_train_steps, train_batch_size=_BATCH, description="document"),
    )
    began = time.perf_counter()
    loop.run()
    pipeline.transformer.eval()
    return time.perf_counter() - began
