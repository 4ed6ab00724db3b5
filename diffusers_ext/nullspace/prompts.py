"""The preserved set: prompts files, and the sub-phrases that a set of prompts implies."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

from diffusers_ext.core.text_files import read_prompt_texts
from diffusers_ext.families import match_family
from diffusers_ext.nullspace.settings import RECOMBINATIONS


def read_prompts_file(path: str | os.PathLike, column: str = "prompt") -> list[str]:
    """Prompts of a text file, one a line without blank lines and `#` lines, or of a table's column.

    Args:
        path: `.txt` or without an ending, or a table: `.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`.
    """
    return read_prompt_texts(path, column, argument="path", comments=True)


def unique(prompts: Sequence[str]) -> list[str]:
    """The prompts without repetitions, in their first order."""
    return list(dict.fromkeys(prompts))


def sub_phrases(prompts: Sequence[str]) -> list[str]:
    """The prompts and each of them with one word left out, without repetitions.

    They carry the preserved set over to prompts that share its words in other company: "a photo of the red digit
    seven" also keeps "a photo of the digit seven" and "a photo of the red digit".
    """
    expanded = list(prompts)
    for prompt in prompts:
        words = prompt.split()
        expanded += [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words)) if len(words) > 1]
    return unique(expanded)


def recombined(prompts: Sequence[str], per_prompt: int = RECOMBINATIONS) -> list[str]:
    """Beginnings of the prompts with ends of others, at most `per_prompt` for each, without the prompts themselves.

    They carry the preserved set over to sentences that nobody wrote down: "a photo of the red digit seven" and "the
    number two in blue" also keep "a photo of the two in blue" and "the number seven". None is longer than both of
    its prompts; the choice is the same for the same prompts.
    """
    generator, known = random.Random(0), unique(prompts)
    words = [prompt.split() for prompt in known]
    made = []
    for begins in words:
        for _ in range(per_prompt):
            ends = generator.choice(words)
            head = generator.randint(0, len(begins))
            tail = generator.randint(0, min(len(ends), max(len(begins), len(ends)) - head))
            made.append(" ".join(begins[:head] + ends[len(ends) - tail :]))
    given = {"", *known}
    return [prompt for prompt in unique(made) if prompt not in given]


def preserved_texts(prompts: Sequence[str], recombinations: int = RECOMBINATIONS) -> list[str]:
    """The texts that a preserved set is measured by: the prompts, their `sub_phrases`, and some `recombined`.

    With recombinations the prompts stand there three times, because the others would else outweigh them.
    """
    again = 2 if recombinations else 0
    return [*unique([*sub_phrases(prompts), *recombined(prompts, recombinations)]), *unique(prompts) * again]


def check_prompts(prompts: Sequence[str], name: str = "prompts") -> list[str]:
    """The prompts as a list; raises `ValueError` where there is none or one is not a string."""
    if isinstance(prompts, str):
        raise ValueError(f"`{name}` must be a list of prompts, got the string {prompts!r}.")
    prompts = list(prompts)
    wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if not prompts or wrong:
        raise ValueError(f"`{name}` must be a non-empty list of strings, got {wrong[:3] or 'none'}.")
    return prompts


def check_prompt_length(pipeline: Any, prompts: Sequence[str]) -> None:
    """Raise `ValueError` for a prompt that the pipeline's tokenizers would cut off.

    Of a joint model the last one counts, which reads long prompts; CLIP beside it is meant to see their beginning.
    """
    family = match_family(pipeline)
    names = ["tokenizer", "tokenizer_2"]
    if family is not None and family.flow_matching:
        names = [family.token_encoders[-1].replace("text_encoder", "tokenizer")]
    for name in names:
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is None:
            continue
        # A textual inversion of several vectors is one word here and several tokens to the model.
        convert = getattr(pipeline, "maybe_convert_prompt", lambda prompts, _: prompts)
        written = convert(list(prompts), tokenizer)
        lengths = [len(ids) for ids in tokenizer(written, truncation=False).input_ids]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > tokenizer.model_max_length:
            raise ValueError(
                f"Every prompt must fit the {name} ({tokenizer.model_max_length} tokens), got {lengths[longest]} "
                f"tokens in {prompts[longest]!r}. Shorten it: what is cut off would not be preserved."
            )
