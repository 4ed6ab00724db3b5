"""Choose the anchor of an erasure: the preserved concept that the frozen model tells least from the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline

from diffusers_ext.eraser.anchors import anchor_distances
from diffusers_ext.eraser.concepts import contains_concept, replace_concept
from diffusers_ext.eraser.prompt_embeddings import encode_video_prompts
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.families.registry import find_family
from training.eraser_data import ClipSize
from training.eraser_text import RunText


logger = get_logger(__name__)


_MOST_PROMPTS = 16


@torch.no_grad()
def choose_anchor_concept(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    concept: str,
    candidates: Sequence[str],
    recipe: EraserTraining,
    size: ClipSize | None = None,
) -> dict[str, float]:
    """Candidates, preserved concepts, with their distances from the concept, the nearest first.

    At most 16 prompts that name the concept are used, evenly chosen. Of the recipe sampling steps,
    guidance and seed are read; clips are of the model's own size where none is given.

    Raises:
        ValueError: no candidate, or no prompt that names the concept.
    """
    naming = [prompt for prompt in prompts if contains_concept(prompt, concept)]
    if not candidates or not naming:
        raise ValueError(
            "`candidates` must name a concept and `prompts` the erased one, got "
            f"{len(candidates)} candidates and {len(naming)} prompts with {concept!r}. Name preserved "
            "concepts, or give the anchor concept yourself."
        )
    chosen = [naming[row] for row in _spread(len(naming))]
    versions = [chosen, *([replace_concept(p, concept, c) for p in chosen] for c in candidates)]
    transformer = pipeline.transformer
    embeds = encode_video_prompts(
        pipeline.tokenizer,
        pipeline.text_encoder,
        ["", *(prompt for version in versions for prompt in version)],
        transformer.config.max_text_seq_length,
    ).to(transformer.device)
    empty, texts = embeds[0], embeds[1:].unflatten(0, (len(versions), len(chosen)))
    size = (
        ClipSize.of_configs(find_family(pipeline, "eraser"), transformer, pipeline.vae)
        if size is None
        else size
    )
    return rank_anchors(
        pipeline, texts[0], dict(zip(candidates, texts[1:], strict=True)), empty, recipe, size
    )


def rank_anchors(
    pipeline: DiffusionPipeline,
    target_embeds: torch.Tensor,
    anchors: Mapping[str, torch.Tensor],
    empty_embed: torch.Tensor,
    recipe: EraserTraining,
    size: ClipSize,
) -> dict[str, float]:
    """As `choose_anchor_concept`, of embeddings; the text encoder is not read.

    `target_embeds` are `(prompts, text, dim)`, `anchors` those of the same prompts with each candidate
    in the place of the concept, `empty_embed` `(text, dim)`.
    """
    distances = anchor_distances(
        find_family(pipeline, "eraser").velocity(pipeline, *size),
        pipeline.scheduler,
        target_embeds,
        torch.stack(list(anchors.values())),
        empty_embed,
        latent_shape=find_family(pipeline, "eraser").latent_shape(
            pipeline.transformer.config, pipeline.vae.config, *size
        ),
        num_inference_steps=recipe.num_inference_steps,
        guidance_scale=recipe.sampling_guidance_scale,
        seed=recipe.seed,
    ).tolist()
    return dict(sorted(zip(anchors, distances, strict=True), key=lambda pair: pair[1]))


def settle_anchor(
    text: RunText,
    concept: str,
    pipeline: DiffusionPipeline,
    recipe: EraserTraining,
    size: ClipSize,
) -> tuple[RunText, str]:
    """The text of a run with the best of the candidates that `--anchor_concept auto` has encoded, and its word."""
    device, rows = pipeline.transformer.device, _spread(len(text.prompts.target))
    anchors = {word: embeds[rows].to(device) for word, embeds in text.anchors.items()}
    target, empty = text.embeds.target[rows].to(device), text.embeds.empty.to(device)
    ranked = rank_anchors(pipeline, target, anchors, empty, recipe, size)
    word = next(iter(ranked))
    logger.info("Distances from %r: %s", concept, {k: round(v, 4) for k, v in ranked.items()})
    logger.info("Chose the anchor %r; give `--anchor_concept` to have another one.", word)
    replaced = [replace_concept(prompt, concept, word) for prompt in text.prompts.target]
    prompts = replace(text.prompts, anchor=replaced)
    embeds = text.embeds._replace(anchor=text.anchors[word])
    # The other candidates' embeddings are as large as all other text together.
    return replace(text, prompts=prompts, embeds=embeds, anchors={}), word


def _spread(count: int) -> list[int]:
    return list(range(0, count, -(-count // _MOST_PROMPTS)))
