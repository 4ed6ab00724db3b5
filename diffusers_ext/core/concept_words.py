"""A concept in a prompt: where its words stand, and other words in their place."""

from __future__ import annotations

import re


def concept_pattern(concept: str) -> re.Pattern[str]:
    """Finds a concept as whole words, in any case and with blanks of any kind."""
    words = concept.split()
    if not words:
        raise ValueError(f"`concept` must be a word or a few words, got {concept!r}.")
    return re.compile(r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)", re.IGNORECASE)


def concept_spans(prompt: str, concept: str) -> list[tuple[int, int]]:
    """(start, end) of each occurrence of a concept (`concept_pattern`)."""
    return [match.span() for match in concept_pattern(concept).finditer(prompt)]


def contains_concept(prompt: str, concept: str) -> bool:
    """Whether a prompt names a concept as whole words, in any case."""
    return bool(concept_spans(prompt, concept))


def replace_concept(prompt: str, concept: str, replacement: str) -> str:
    """The prompt with each occurrence of a concept replaced, and nothing else touched.

    A capital letter that only the prompt gives the concept goes over to the replacement; articles stay as they are.
    """
    if not contains_concept(prompt, concept):
        raise ValueError(
            f"`prompt` must contain {concept!r} as a whole word, got {prompt!r}. Write it in this "
            "form into the prompt, or name the form that the prompt uses."
        )
    if not replacement.strip() or contains_concept(replacement, concept):
        raise ValueError(f"`replacement` must be words without {concept!r} among them, got {replacement!r}.")

    def other(match: re.Match[str]) -> str:
        capital = match[0][0].isupper() and not concept.lstrip()[0].isupper()
        return replacement[0].upper() + replacement[1:] if capital else replacement

    return concept_pattern(concept).sub(other, prompt)
