"""What the moving-digits model can be asked: words, templates, and what was kept out of its training."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from transformers import T5Tokenizer

from examples.digits.prompts import COLORS, DIGITS, HELD_OUT_PAIRS, TRAINING_PAIRS
from examples.digits.small_tokenizers import t5_tokenizer

DIRECTIONS = {"right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0)}  # (dy, dx) a frame
TEMPLATES = (
    "a {color} {digit} moving {direction}",
    "the {color} {digit} goes {direction}",
    "a {digit} in {color} moving {direction}",
    "the number {digit} in {color} goes {direction}",
)
HELD_OUT_TEMPLATE = "the {color} number {digit} moving {direction}"
PARAPHRASES = (
    "{direction} goes the {color} {digit}",
    "{color} {digit} {direction}",
    "a {digit} a {digit} moving {direction} in {color}",
    "in {color} a number moving {direction} the {digit}",
)
NEUTRAL_DIGIT, NEUTRAL_COLOR = "digit", "colored"
PROMPT_LENGTH = 12
COMBINATIONS = tuple((color, digit, direction) for color, digit in TRAINING_PAIRS for direction in DIRECTIONS)
HELD_OUT_COMBINATIONS = tuple((color, digit, direction) for color, digit in HELD_OUT_PAIRS for direction in DIRECTIONS)

_FILLERS = ("a", "the", "in", "number", "moving", "goes", NEUTRAL_DIGIT, NEUTRAL_COLOR)


class Wanted(NamedTuple):
    """What a prompt asks for; `None` where it says nothing."""

    color: str | None
    digit: str | None
    direction: str | None


def read_prompt(prompt: str) -> Wanted:
    """The first colour, digit and direction that a prompt names."""
    words = re.findall(r"[a-z]+", prompt.lower())
    kinds = (COLORS, DIGITS, DIRECTIONS)
    return Wanted(*(next((word for word in words if word in kind), None) for kind in kinds))


def write_prompts(
    *,
    colors: tuple[str, ...] = tuple(COLORS),
    digits: tuple[str, ...] = DIGITS,
    templates: tuple[str, ...] = TEMPLATES,
) -> list[str]:
    """Every template with every colour, digit and direction asked for."""
    asked = itertools.product(templates, colors, digits, DIRECTIONS)
    return [t.format(color=c, digit=d, direction=m) for t, c, d, m in asked]


def make_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that has one piece for each word of the templates and spells all other words in letters."""
    words = sorted({*DIGITS, *COLORS, *DIRECTIONS, *_FILLERS})
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -1.0) for word in words if len(word) > 1]
    pieces += [("▁a", -1.0), *((letter, -9.0) for letter in letters)]
    tokenizer = t5_tokenizer(pieces, model_max_length=PROMPT_LENGTH)
    broken = [w for w in words if len(tokenizer(w, add_special_tokens=False).input_ids) != 1]
    if broken:
        raise ValueError(f"Every word of the templates must be one token, got several for {broken}.")
    return tokenizer
