"""From the command line's files to encoded prompts and their anchor, the text encoder in memory only in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline

from diffusers_ext.eraser.batch import EraserText, encode_video_prompts, prompt_length
from diffusers_ext.eraser.concepts import anchor_distances, contains_concept, neighbouring_concepts, replace_concept
from diffusers_ext.eraser.recipe import AUTO_ANCHOR, EraserSettings, EraserTraining
from diffusers_ext.training.eraser.data import ClipSize, encode_text
from diffusers_ext.training.eraser.prompts import (
    EraserPrompts,
    make_eraser_prompts,
    read_eraser_prompts,
    write_preserved_concepts,
)
from diffusers_ext.training.run.base_model import load_text_pipeline

logger = get_logger(__name__)

PRESERVED_NAME = "preserved_concepts.txt"
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

    At most 16 prompts that name the concept are used, evenly chosen. Of the recipe sampling steps, guidance and seed
    are read; clips are of the model's own size where none is given.

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
    texts = ["", *(prompt for version in versions for prompt in version)]
    embeds = encode_video_prompts(pipeline, texts).to(pipeline.transformer.device)
    empty, texts = embeds[0], embeds[1:].unflatten(0, (len(versions), len(chosen)))
    size = ClipSize.of_pipeline(pipeline) if size is None else size
    return rank_anchors(pipeline, texts[0], dict(zip(candidates, texts[1:], strict=True)), empty, recipe, size)


def rank_anchors(
    pipeline: DiffusionPipeline,
    target_embeds: torch.Tensor,
    anchors: Mapping[str, torch.Tensor],
    empty_embed: torch.Tensor,
    recipe: EraserTraining,
    size: ClipSize,
) -> dict[str, float]:
    """As `choose_anchor_concept`, of embeddings; the text encoder is not read.

    `target_embeds` are `(prompts, text, dim)`, `anchors` those of the same prompts with each candidate in the place of
    the concept, `empty_embed` `(text, dim)`.
    """
    distances = anchor_distances(
        size.velocity(pipeline),
        pipeline.scheduler,
        target_embeds,
        torch.stack(list(anchors.values())),
        empty_embed,
        latent_shape=size.latent_shape(pipeline),
        **recipe.sampling,
    ).tolist()
    return dict(sorted(zip(anchors, distances, strict=True), key=lambda pair: pair[1]))


def settle_anchor(
    text: RunText, concept: str, pipeline: DiffusionPipeline, recipe: EraserTraining, size: ClipSize
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


@dataclass(frozen=True)
class GivenTexts:
    """What the files of the command line hold."""

    target: list[str]  # prompts of the concept
    preserved_concepts: list[str] | None  # `None` where the text encoder is to choose them
    preserved_prompts: list[str]  # whole prompts to preserve besides

    def prompts(self, settings: EraserSettings, preserved_concepts: list[str]) -> EraserPrompts:
        """All prompts of the run; raises `ValueError` where they contradict each other."""
        return make_eraser_prompts(
            self.target,
            settings.target_concept,
            anchor_concept=None if settings.anchor_concept == AUTO_ANCHOR else settings.anchor_concept,
            preserved_concepts=preserved_concepts,
            preserved_prompts=self.preserved_prompts,
            max_preserved=settings.max_preserved_prompts,
            seed=settings.seed,
        )


@dataclass(frozen=True)
class RunText:
    """All text of a run, encoded on the CPU.

    Attributes:
        preserved_concepts: given or chosen.
        validation: `(validation prompts, text, dim)`; `None` without any.
        anchors: of `--anchor_concept auto`, the target prompts with each preserved concept in the place of the
            concept, `(target prompts, text, dim)` each.
    """

    prompts: EraserPrompts
    preserved_concepts: list[str]
    embeds: EraserText
    validation: torch.Tensor | None
    anchors: dict[str, torch.Tensor] = field(default_factory=dict)


def read_texts(settings: EraserSettings) -> GivenTexts:
    """Read the files of the command line and check them against each other.

    Raises:
        ValueError: a missing or empty file, a preserved text that names the concept, or a target prompt without the
            concept where an anchor concept shall replace it.
    """
    column = settings.prompt_column
    optional = (settings.preserved_concepts_file, settings.preserved_prompts_file)
    concepts, prompts = (read_eraser_prompts(path, column) if path else [] for path in optional)
    chosen = None if settings.auto_preserved_concepts else concepts
    if settings.anchor_concept == AUTO_ANCHOR and chosen == []:
        raise ValueError(
            "`anchor_concept` must be a word where there are no preserved concepts to choose it from, got "
            f"{AUTO_ANCHOR!r}. Give `--preserved_concepts_file` or `--auto_preserved_concepts`."
        )
    given = GivenTexts(read_eraser_prompts(settings.prompts_file, column), chosen, prompts)
    prompts = given.prompts(settings, concepts)
    if settings.anchor_concept == AUTO_ANCHOR:
        for prompt in prompts.target:
            replace_concept(prompt, settings.target_concept, AUTO_ANCHOR)  # raises where it is not named
    return given


def encode_run_text(settings: EraserSettings, given: GivenTexts, accelerator: Accelerator) -> RunText:
    """Encode everything a run reads; the text encoder is gone afterwards."""
    pipeline = load_text_pipeline(settings, accelerator.device)
    concepts = given.preserved_concepts
    if concepts is None:
        concepts = _nearest_concepts(settings, pipeline, accelerator)
    prompts = given.prompts(settings, concepts)
    embeds = encode_text(pipeline, prompts, batch_size=settings.text_batch_size)
    validation, anchors = None, {}
    if settings.validation_prompt:
        validation = encode_video_prompts(pipeline, settings.validation_prompt, batch_size=settings.text_batch_size)
    for concept in concepts if settings.anchor_concept == AUTO_ANCHOR else ():
        texts = [replace_concept(prompt, settings.target_concept, concept) for prompt in prompts.target]
        anchors[concept] = encode_video_prompts(pipeline, texts, batch_size=settings.text_batch_size)
    return RunText(prompts, concepts, embeds, validation, anchors)


def _nearest_concepts(settings: EraserSettings, pipeline: Any, accelerator: Accelerator) -> list[str]:
    """Neighbours of the concept; the main process shows them and writes them down."""
    near = neighbouring_concepts(
        pipeline.tokenizer,
        pipeline.text_encoder,
        settings.target_concept,
        settings.num_preserved_concepts,
        max_sequence_length=prompt_length(pipeline),
        exclude=[] if settings.anchor_concept in (None, AUTO_ANCHOR) else [settings.anchor_concept],
    )
    if accelerator.is_main_process:
        path = Path(settings.output_dir, PRESERVED_NAME)
        write_preserved_concepts(path, settings.target_concept, near)
    return [neighbour.word for neighbour in near]
