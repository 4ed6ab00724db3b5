"""The prompts of an erasure: what is erased, what the model shall show instead, and what it must keep."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.eraser.concepts import Neighbour, contains_concept, replace_concept
from diffusers_ext.nullspace.prompts import check_prompts, read_prompts_file, unique

logger = logging.getLogger(__name__)


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
        """Every different prompt once, the empty one included: what has to be encoded."""
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

    What is kept are the target prompts with each preserved concept in the place of the concept, the anchor prompts and
    `preserved_prompts`. Where no target prompt names the concept, each preserved concept is a prompt by itself.

    Args:
        target: prompts that ask for the concept.
        anchor_concept: a neutral word that takes its place in the anchors ("a red seven" -> "a red digit"), which
            every target prompt then must name; the anchors are empty when `None`.
        max_preserved: keep a random choice, by `seed`, of the prompts with a preserved concept; all when `None`.

    Raises:
        ValueError: something preserved that names the concept, or a target prompt without it where there is an anchor
            concept.
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


def write_preserved_concepts(path: str | os.PathLike, concept: str, neighbours: Sequence[Neighbour]) -> None:
    """Write neighbours one a line, for the user to edit and give back, and say so in the log."""
    cosines = ", ".join(f"{word} {cosine:.2f}" for word, cosine in neighbours)
    logger.info(f"Preserved neighbours of {concept!r} (cosine): {cosines}")
    header = [
        f"# Words near {concept!r} in the text encoder's embedding space, the nearest first.",
        f"# Cosines: {cosines}",
    ]
    lines = [*header, *(neighbour.word for neighbour in neighbours)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(lines) + "\n")
    logger.info(f"Wrote them to {path}: take out what belongs to the concept and train again.")
