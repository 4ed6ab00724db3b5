"""The prompts of an edit of knowledge: what they name, what stands in its place, and what is kept."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.concept_words import concept_pattern, concept_spans, contains_concept
from diffusers_ext.families import Family, match_family
from diffusers_ext.nullspace.prompts import check_prompts, sub_phrases, unique

TEMPLATES = ("{}", "a {}", "the {}", "a photo of a {}", "a picture of a {}", "a drawing of a {}", "an image of the {}")
Weights = Mapping[str, float]


@dataclass(frozen=True)
class ConceptEdit:
    """One concept, and what the model is to read in its place.

    Args:
        target: the concept, as it stands in prompts.
        anchor: the words in its place; `None` for those that preserved prompts have in its place and the model reads
            most alike; `""` makes the whole prompt empty; `{words: weight}` reads as their weighted
            mixture, with weights that sum to 1. It may hold the target ("seven" as "green seven").
        prompts: prompts with the target. When given, they are all that is edited; otherwise `TEMPLATES`, and the
            preserved prompts that name the target with their sub-phrases.
    """

    target: str
    anchor: str | Weights | None = None
    prompts: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.target.strip():
            raise ValueError(f"`target` must be a word or a few words, got {self.target!r}.")
        if self.anchor is not None and abs(sum(self.weights.values()) - 1) > 1e-6:
            raise ValueError(f"`anchor` must have weights that sum to 1, got {dict(self.weights)}.")
        for anchor in self.weights:
            if anchor.split() == self.target.split():
                raise ValueError(f"`anchor` must differ from `target`, got {anchor!r} for both.")
        for prompt in self.prompts:
            if not contains_concept(prompt, self.target):
                raise ValueError(f"`prompts` must name the target {self.target!r}, got {prompt!r}.")

    @classmethod
    def read(cls, edits: Mapping[str, str | Weights | None] | Sequence[ConceptEdit]) -> list[ConceptEdit]:
        """Edits as they may be given: `{target: anchor}`, or themselves."""
        if isinstance(edits, Mapping):
            return [cls(target, anchor) for target, anchor in edits.items()]
        found = [] if isinstance(edits, str) else list(edits)
        if isinstance(edits, str) or not all(isinstance(edit, cls) for edit in found):
            raise ValueError(f"`edits` must be {{target: anchor}} or `ConceptEdit`s, got {edits!r}.")
        return found

    @property
    def told(self) -> str:
        """The anchor in words."""
        if len(self.weights) == 1:
            return next(iter(self.weights))
        return " + ".join(f"{weight:g} {words}" for words, weight in self.weights.items())

    @property
    def weights(self) -> Weights:
        """`{words: weight}` of what takes the place of the target; empty while that is to be found."""
        if self.anchor is None:
            return {}
        return {self.anchor: 1.0} if isinstance(self.anchor, str) else self.anchor


@dataclass(frozen=True)
class EditPrompts:
    """The prompts of one edit.

    Attributes:
        named: preserved prompts that name the target; they are edited, unless the edit has prompts of its own.
        others: the other edits of the call, whose targets are replaced with this one's where a prompt names several.
    """

    edit: ConceptEdit
    targets: list[str]
    named: list[str]
    others: Sequence[ConceptEdit] = ()

    @property
    def anchors(self) -> list[tuple[list[str], torch.Tensor]]:
        """What the targets are to be read as: prompts in their order and weights `(prompts, 1, 1)`, to be summed."""
        read = []
        for prompt in self.targets:
            others = [edit for edit in self.others if not edit.prompts or prompt in edit.prompts]
            read.append(list(anchor_mixture(prompt, [self.edit, *others]).items()))
        columns = itertools.zip_longest(*read)
        return [
            (
                [prompt if one is None else one[0] for prompt, one in zip(self.targets, column)],
                torch.tensor([0.0 if one is None else one[1] for one in column], dtype=torch.float64)[:, None, None],
            )
            for column in columns
        ]


def anchor_mixture(prompt: str, edits: Sequence[ConceptEdit]) -> dict[str, float]:
    """`{prompt: weight}` of what a prompt is read as: every target that it names is replaced, all at once.

    One by one, the anchor of the first might be the target of the next. Of targets that hold one another the longer
    one is meant, and an empty anchor empties the whole prompt.
    """
    named = [edit for edit in edits if contains_concept(prompt, edit.target)]
    by_length = sorted(range(len(named)), key=lambda index: -len(named[index].target))
    pattern = "|".join(f"({concept_pattern(named[index].target).pattern})" for index in by_length)
    found: dict[str, float] = {}
    for chosen in itertools.product(*(edit.weights.items() for edit in named)):
        text = prompt if all(words for words, _ in chosen) else ""
        if named and text:
            words = [chosen[index][0] for index in by_length]
            text = re.sub(pattern, lambda match, words=words: words[match.lastindex - 1], text, flags=re.IGNORECASE)
        found[text] = found.get(text, 0.0) + math.prod(weight for _, weight in chosen)
    return found


def stand_ins(target: str, preserve: Sequence[str], others: Sequence[str]) -> list[str]:
    """What stands in `others` where preserved prompts name the target: "nine" in "a red nine" for "a red three".

    Of "red" and "photo of the red digit", for "yellow" in another template, only the first is a concept.
    """
    found = []
    for prompt in preserve:
        for start, end in concept_spans(prompt, target):
            before, after = prompt[:start], prompt[end:]
            for other in others:
                words = other[len(before) : len(other) - len(after)]
                if words and words == words.strip() and other == before + words + after:
                    found.append(words)
    found = [words for words in unique(found) if not contains_concept(words, target)]
    return [words for words in found if not any(contains_concept(words, other) for other in found if other != words)]


def carried_along(edits: Sequence[ConceptEdit], earlier: Sequence[ConceptEdit]) -> list[ConceptEdit]:
    """Earlier edits that new ones change: where "five" is read as "seven", an edit of "seven" is one of "five".

    Raises:
        ValueError: an edit leads back to the target of an earlier one; an earlier one does not name its anchor.
    """
    unknown = [one.target for one in earlier if one.anchor is None]
    if unknown:
        raise ValueError(f"`earlier` must name the anchors of earlier edits, got none for {unknown}.")
    found = []
    for one in earlier:
        weights: dict[str, float] = {}
        for words, weight in one.weights.items():
            for anchor, share in anchor_mixture(words, edits).items():
                weights[anchor] = weights.get(anchor, 0.0) + weight * share
        if weights == dict(one.weights) or one.target in [edit.target for edit in edits]:
            continue
        if any(words.split() == one.target.split() for words in weights):
            raise ValueError(
                f"`edits` must lead to concepts that earlier edits have left, got {one.target!r}, which the model "
                f"reads as {one.told!r} by now. Name another anchor."
            )
        found.append(ConceptEdit(one.target, weights, one.prompts))
    return found


def split_prompts(
    edits: Sequence[ConceptEdit],
    preserve: Sequence[str],
    expand_sub_phrases: bool,
    earlier: Sequence[ConceptEdit] = (),
) -> tuple[list[EditPrompts], list[str]]:
    """The prompts of every edit, and those that are preserved.

    Preserved prompts that name the target of an edit without prompts of its own are edited, not preserved; those of
    earlier edits are preserved as they are read by now.

    Raises:
        ValueError: two edits of one target; no prompt is left to preserve.
    """
    names = [edit.target.casefold().split() for edit in edits]
    for index, edit in enumerate(edits):
        if names[index] in names[:index]:
            raise ValueError(f"`edits` must name each target once, got {edit.target!r} again.")
    given = check_prompts(preserve, "preserve")
    named = {edit.target: [prompt for prompt in given if contains_concept(prompt, edit.target)] for edit in edits}
    edited = {prompt for edit in edits for prompt in edit.prompts or named[edit.target]}
    kept = [prompt for prompt in given if prompt not in edited]
    if not kept:
        raise ValueError("`preserve` must hold a prompt that names no target, got none: nothing would be preserved.")
    for one in earlier:
        own = one.prompts or [template.format(one.target) for template in TEMPLATES]
        kept += [prompt for prompt in own if not any(contains_concept(prompt, edit.target) for edit in edits)]
    made = []
    for edit in edits:
        found = list(edit.prompts)
        if not found:
            found = named[edit.target]
            if expand_sub_phrases:
                found = [p for p in sub_phrases(found) if contains_concept(p, edit.target)]
            found = unique([*found, *(template.format(edit.target) for template in TEMPLATES)])
        made.append(EditPrompts(edit, found, named[edit.target], [other for other in edits if other is not edit]))
    return made, unique(sub_phrases(kept) if expand_sub_phrases else kept)


def check_read_apart(pipeline: DiffusionPipeline, edits: Sequence[EditPrompts], preserved: Sequence[str]) -> None:
    """Raise `ValueError` where prompts of the same tokens are to be read otherwise: one cannot be both.

    They are a preserved prompt and an edited one, or those of two edits.
    """
    family = match_family(pipeline) or Family()

    def tokens(prompt: str) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, family.token_ids(pipeline, prompt)))

    edited: dict[Any, tuple[str, str, Any]] = {}
    for edit in edits:
        anchors = [(list(map(tokens, prompts)), weights.flatten().tolist()) for prompts, weights in edit.anchors]
        for index, prompt in enumerate(edit.targets):
            wish = {(prompts[index], weights[index]) for prompts, weights in anchors if weights[index]}
            target, same, other = edited.setdefault(tokens(prompt), (edit.edit.target, prompt, wish))
            if wish != other:
                raise ValueError(
                    f"`edits` must not ask for two things in one place, got {edit.edit.target!r} and {target!r}, "
                    f"which the model reads alike: {prompt!r} and {same!r} have the same tokens. Leave one out."
                )
    for prompt in preserved:
        target, same, _ = edited.get(tokens(prompt), (None, None, None))
        if same is not None:
            raise ValueError(
                f"`preserve` must hold no prompt that the model reads as one with the target {target!r}, got "
                f"{prompt!r}, whose tokens are those of {same!r}. Take it out, or shorten what is cut off."
            )


def replaced(prompts: Sequence[str], target: str, words: str) -> list[str]:
    """The prompts with other words for the target; empty prompts for none."""
    pattern = concept_pattern(target)
    return [pattern.sub(lambda _: words, prompt) if words else "" for prompt in prompts]
