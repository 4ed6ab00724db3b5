"""From the command line's files to encoded prompts, with the text encoder in memory only in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from diffusers_ext.eraser.batch import EraserText
from diffusers_ext.eraser.concepts import replace_concept
from diffusers_ext.eraser.neighbours import neighbouring_concepts
from diffusers_ext.eraser.prompt_embeddings import encode_video_prompts
from diffusers_ext.eraser.recipe import AUTO_ANCHOR, EraserSettings
from training.eraser_data import encode_text
from training.eraser_prompts import (
    EraserPrompts,
    auto_preserved_concepts,
    make_eraser_prompts,
    read_eraser_prompts,
)
from training.text_pipeline import load_text_pipeline


logger = get_logger(__name__)

PRESERVED_NAME = "preserved_concepts.txt"


@dataclass(frozen=True)
class GivenTexts:
    """What the files of the command line hold.

    Attributes:
        target: prompts of the concept.
        preserved_concepts: `None` where the text encoder is to choose them.
        preserved_prompts: whole prompts to preserve besides.
    """

    target: list[str]
    preserved_concepts: list[str] | None
    preserved_prompts: list[str]

    def prompts(self, args: EraserSettings, preserved_concepts: list[str]) -> EraserPrompts:
        """All prompts of the run; raises `ValueError` where they contradict each other."""
        return make_eraser_prompts(
            self.target,
            args.target_concept,
            anchor_concept=None if args.anchor_concept == AUTO_ANCHOR else args.anchor_concept,
            preserved_concepts=preserved_concepts,
            preserved_prompts=self.preserved_prompts,
            max_preserved=args.max_preserved_prompts,
            seed=args.seed,
        )


@dataclass(frozen=True)
class RunText:
    """All text of a run, encoded.

    Attributes:
        prompts: of the run.
        preserved_concepts: given or chosen.
        embeds: of the prompts, on the CPU.
        validation: `(validation prompts, text, dim)`, on the CPU; `None` without any.
        anchors: of `--anchor_concept auto`, the target prompts with each preserved concept in the place of
            the concept, `(target prompts, text, dim)` each.
    """

    prompts: EraserPrompts
    preserved_concepts: list[str]
    embeds: EraserText
    validation: torch.Tensor | None
    anchors: dict[str, torch.Tensor] = field(default_factory=dict)


def read_texts(args: EraserSettings) -> GivenTexts:
    """Read the files of the command line and check them against each other.

    Raises:
        ValueError: a missing or empty file, a preserved text that names the concept, or a target
            prompt without the concept where an anchor concept shall replace it.
    """
    column = args.prompt_column
    optional = (args.preserved_concepts_file, args.preserved_prompts_file)
    concepts, prompts = (read_eraser_prompts(path, column) if path else [] for path in optional)
    chosen = None if args.auto_preserved_concepts else concepts
    if args.anchor_concept == AUTO_ANCHOR and chosen == []:
        raise ValueError(
            "`anchor_concept` must be a word where there are no preserved concepts to choose it from, got "
            f"{AUTO_ANCHOR!r}. Give `--preserved_concepts_file` or `--auto_preserved_concepts`."
        )
    given = GivenTexts(read_eraser_prompts(args.prompts_file, column), chosen, prompts)
    prompts = given.prompts(args, concepts)
    if args.anchor_concept == AUTO_ANCHOR:
        for prompt in prompts.target:
            replace_concept(
                prompt, args.target_concept, AUTO_ANCHOR
            )  # raises where it is not named
    return given


def encode_run_text(args: EraserSettings, given: GivenTexts, accelerator: Accelerator) -> RunText:
    """Encode everything a run reads; the text encoder is gone afterwards."""
    pipeline = load_text_pipeline(args, accelerator.device)
    concepts = given.preserved_concepts
    if concepts is None:
        concepts = _nearest_concepts(args, pipeline, accelerator)
    prompts = given.prompts(args, concepts)
    embeds = encode_text(pipeline, prompts, batch_size=args.text_batch_size)
    validation = None
    if args.validation_prompt:
        validation = encode_video_prompts(
            pipeline.tokenizer,
            pipeline.text_encoder,
            args.validation_prompt,
            pipeline.transformer.config.max_text_seq_length,
            batch_size=args.text_batch_size,
        )
    anchors = _candidate_anchors(args, pipeline, prompts, concepts)
    return RunText(prompts, concepts, embeds, validation, anchors)


def _candidate_anchors(
    args: EraserSettings, pipeline: Any, prompts: EraserPrompts, concepts: list[str]
) -> dict[str, torch.Tensor]:
    if args.anchor_concept != AUTO_ANCHOR:
        return {}
    encoder = (pipeline.tokenizer, pipeline.text_encoder)
    length = pipeline.transformer.config.max_text_seq_length
    found = {}
    for concept in concepts:
        texts = [replace_concept(prompt, args.target_concept, concept) for prompt in prompts.target]
        found[concept] = encode_video_prompts(
            *encoder, texts, length, batch_size=args.text_batch_size
        )
    return found


def _nearest_concepts(args: EraserSettings, pipeline: Any, accelerator: Accelerator) -> list[str]:
    """Neighbours of the concept; the main process shows them and writes them down."""
    options = {
        "max_sequence_length": pipeline.transformer.config.max_text_seq_length,
        "exclude": [] if args.anchor_concept in (None, AUTO_ANCHOR) else [args.anchor_concept],
    }
    encoder, count = (pipeline.tokenizer, pipeline.text_encoder), args.num_preserved_concepts
    if accelerator.is_main_process:
        path = Path(args.output_dir, PRESERVED_NAME)
        return auto_preserved_concepts(*encoder, args.target_concept, count, path, **options)
    near = neighbouring_concepts(*encoder, args.target_concept, count, **options)
    return [neighbour.word for neighbour in near]
