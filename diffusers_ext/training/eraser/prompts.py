"""The prompts of an erasure, from files to embeddings: what is erased, what is shown instead, what must stay."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.concept_words import contains_concept, replace_concept
from diffusers_ext.eraser.batch import encode_video_prompts, prompt_length
from diffusers_ext.eraser.concepts import Neighbour, anchor_distances, neighbouring_concepts
from diffusers_ext.eraser.recipe import AUTO_ANCHOR, EraserSettings, EraserTraining
from diffusers_ext.eraser.teacher.runs import EraserText
from diffusers_ext.eraser.teacher.store import first_process_has
from diffusers_ext.families import find_family
from diffusers_ext.families.text_conditioning import Text
from diffusers_ext.nullspace.prompts import check_prompts, read_prompts_file, unique
from diffusers_ext.training.eraser.data import ClipSize
from diffusers_ext.training.run.base_model import load_text_pipeline

logger = logging.getLogger(__name__)

PRESERVED_NAME = "preserved_concepts.txt"
_MOST_PROMPTS = 16  # that an anchor is chosen by


@dataclass(frozen=True)
class EraserPrompts:
    """The prompts of one erasure."""

    target: list[str]  # ask for the concept
    anchor: list[str]  # what each of them becomes; `""` leads to the unconditional model
    preserved: list[str]  # whose clips must not change; at least one, which may be `""`

    def __post_init__(self) -> None:
        for name in ("target", "anchor", "preserved"):
            check_prompts(getattr(self, name), name)
        if len(self.target) != len(self.anchor):
            raise ValueError(
                f"`anchor` must have one prompt for each target, got {len(self.anchor)} for {len(self.target)}."
            )
        both = sorted({*self.target} & {*self.anchor, *self.preserved})
        if both:
            raise ValueError(f"`target` must share no prompt with what is kept, got {both[0]!r} in both.")

    @property
    def texts(self) -> list[str]:
        """Every different prompt once, the empty one included."""
        return unique(["", *self.target, *self.anchor, *self.preserved])

    @property
    def facts(self) -> dict[str, Any]:
        """All prompts, JSON-able."""
        return {name: list(getattr(self, name)) for name in ("target", "anchor", "preserved")}


def read_eraser_prompts(path: str | os.PathLike, column: str = "prompt") -> list[str]:
    """Prompts or concepts of a text file or table, each once; see `read_prompts_file`."""
    return unique(read_prompts_file(path, column))


def make_eraser_prompts(
    target: Sequence[str],
    concept: str,
    *,
    anchor_concept: str | None = None,
    preserved_concepts: Sequence[str] = (),
    preserved_prompts: Sequence[str] = (),
    max_preserved: int | None = None,
    seed: int = 0,
) -> EraserPrompts:
    """Write all prompts of an erasure.

    `anchor_concept`, a neutral word, takes the concept's place in the anchors ("a red seven" -> "a red digit"), and
    every target prompt must name the concept; without it the anchors are empty. What is kept are the target prompts
    with each preserved concept in the place of the concept (at most `max_preserved` of them, chosen by `seed`), the
    anchor prompts and `preserved_prompts`. Where no target prompt names the concept, each preserved concept is a
    prompt by itself.

    Raises `ValueError` where something preserved names the concept.
    """
    target = unique(check_prompts(target, "target"))
    for name, texts in (("preserved_concepts", preserved_concepts), ("preserved_prompts", preserved_prompts)):
        against = [text for text in texts if contains_concept(text, concept)]
        if against:
            raise ValueError(f"`{name}` must not name {concept!r}, which is erased, got {against[0]!r}.")
    if anchor_concept is None:
        anchor = [""] * len(target)
    else:
        anchor = [replace_concept(prompt, concept, anchor_concept) for prompt in target]
    varied = unique(_vary(target, concept, preserved_concepts))
    if max_preserved is not None and max_preserved < len(varied):
        rows = sorted(random.Random(seed).sample(range(len(varied)), max_preserved))
        varied = [varied[row] for row in rows]
    preserved = unique([*varied, *(text for text in anchor if text), *preserved_prompts])
    return EraserPrompts(target, anchor, preserved or [""])


def _vary(target: Sequence[str], concept: str, others: Sequence[str]) -> list[str]:
    """Target prompts about other concepts."""
    naming = [prompt for prompt in target if contains_concept(prompt, concept)]
    if others and not naming:
        logger.warning(f"No target prompt names {concept!r}: the preserved concepts are prompts by themselves.")
        return list(others)
    return [replace_concept(prompt, concept, other) for prompt in naming for other in others]


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
    """All text of a run, encoded on the CPU."""

    prompts: EraserPrompts
    preserved_concepts: list[str]  # given or chosen
    embeds: EraserText
    validation: Text | None  # (validation prompts, text, dim); `None` without any
    # Of `--anchor_concept auto`: the target prompts with each preserved concept in the place of the concept,
    # (target prompts, text, dim) each.
    anchors: dict[str, Text] = field(default_factory=dict)


def read_texts(settings: EraserSettings) -> GivenTexts:
    """Read the files of the command line; raises `ValueError` where they lack something or contradict each other."""
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


@torch.no_grad()
def encode_text(pipeline: DiffusionPipeline, prompts: EraserPrompts, *, batch_size: int = 32) -> EraserText:
    """Embeddings of all prompts, kept on the CPU; equal prompts are encoded once."""
    embeds = encode_video_prompts(pipeline, prompts.texts, batch_size=batch_size)
    row = {prompt: index for index, prompt in enumerate(prompts.texts)}
    parts = (prompts.target, prompts.anchor, prompts.preserved)
    chosen = (embeds[[row[prompt] for prompt in part]] for part in parts)
    empty = row[""]
    return EraserText(*chosen, embeds[empty] if isinstance(embeds, torch.Tensor) else embeds[[empty]])


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
        masks_padding=find_family(pipeline, "eraser").masks_padding,
    )
    if accelerator.is_main_process:
        write_preserved_concepts(Path(settings.output_dir, PRESERVED_NAME), settings.target_concept, near)
    return [neighbour.word for neighbour in near]


def write_preserved_concepts(path: str | os.PathLike, concept: str, neighbours: Sequence[Neighbour]) -> None:
    """Write neighbours one a line, for the user to edit and give back, and say so in the log."""
    cosines = ", ".join(f"{word} {cosine:.2f}" for word, cosine in neighbours)
    logger.info(f"Preserved neighbours of {concept!r} (cosine): {cosines}")
    lines = [
        f"# Words near {concept!r} in the text encoder's embedding space, the nearest first.",
        f"# Cosines: {cosines}",
        *(neighbour.word for neighbour in neighbours),
    ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(lines) + "\n")
    logger.info(f"Wrote them to {path}: take out what belongs to the concept and train again.")


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

    At most 16 prompts that name the concept are used, evenly chosen; clips are of the model's own size where none is
    given. Raises `ValueError` where there is no candidate, or no prompt that names the concept.
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
    embeds = encode_video_prompts(pipeline, texts).to(
        getattr(pipeline, find_family(pipeline, "eraser").denoiser).device
    )
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
    image_latents: torch.Tensor | None = None,
) -> dict[str, float]:
    """As `choose_anchor_concept`, of embeddings `(prompts, text, dim)`; the empty prompt's is `(text, dim)`.

    `image_latents` are the first frames of an image-to-video model.
    """
    distances = anchor_distances(
        size.velocity(pipeline, guidance_scale=recipe.sampling_guidance_scale, image_latents=image_latents),
        pipeline.scheduler,
        target_embeds,
        torch.stack(list(anchors.values())),
        empty_embed,
        recipe,
        size.latent_shape(pipeline),
    )
    distances = first_process_has(distances).tolist()
    return dict(sorted(zip(anchors, distances, strict=True), key=lambda pair: pair[1]))


def settle_anchor(
    text: RunText,
    concept: str,
    pipeline: DiffusionPipeline,
    recipe: EraserTraining,
    size: ClipSize,
    image_latents: torch.Tensor | None = None,
) -> tuple[RunText, dict[str, float]]:
    """The text of a run with the best of the candidates of `--anchor_concept auto`, and the distances of all."""
    device, rows = (
        getattr(pipeline, find_family(pipeline, "eraser").denoiser).device,
        _spread(len(text.prompts.target)),
    )
    anchors = {word: embeds[rows].to(device) for word, embeds in text.anchors.items()}
    target, empty = text.embeds.target[rows].to(device), text.embeds.empty.to(device)
    ranked = rank_anchors(pipeline, target, anchors, empty, recipe, size, image_latents)
    word = next(iter(ranked))
    replaced = [replace_concept(prompt, concept, word) for prompt in text.prompts.target]
    prompts = replace(text.prompts, anchor=replaced)
    embeds = text.embeds._replace(anchor=text.anchors[word])
    # The other candidates' embeddings are as large as all other text together.
    return replace(text, prompts=prompts, embeds=embeds, anchors={}), ranked


def _spread(count: int) -> list[int]:
    return list(range(0, count, -(-count // _MOST_PROMPTS)))
