"""What the digits model can be asked: words, colours, templates, and what was kept out of its training."""

from __future__ import annotations

import re

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from examples.digits.small_tokenizers import byte_pair_tokenizer

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = {
    "red": (1.0, 0.10, 0.10),
    "green": (0.10, 0.90, 0.20),
    "blue": (0.15, 0.35, 1.0),
    "yellow": (1.0, 0.90, 0.10),
    "white": (1.0, 1.0, 1.0),
}
TEMPLATES = (
    "a photo of the {color} digit {digit}",
    "a {color} {digit}",
    "a picture of a {color} {digit}",
    "the number {digit} in {color}",
    "a drawing of the {color} number {digit}",
)
HELD_OUT_TEMPLATE = "a drawing of a {digit} in {color}"
# Two digits per colour and one colour per digit: every word was seen, the pair never was.
HELD_OUT_PAIRS = (
    ("red", "four"), ("red", "nine"), ("green", "zero"), ("green", "seven"), ("blue", "one"),
    ("blue", "six"), ("yellow", "two"), ("yellow", "five"), ("white", "three"), ("white", "eight"),
)  # fmt: skip
TRAINING_PAIRS = tuple((c, d) for c in COLORS for d in DIGITS if (c, d) not in HELD_OUT_PAIRS)
RARE_TOKENS = ("sks", "ohwx", "zwx")
PROMPT_LENGTH = 16

_FILLERS = ("a", "the", "of", "in", "photo", "picture", "drawing", "digit", "number", "glyph", "moving")


def prompt_pairs(template: str, pairs: tuple[tuple[str, str], ...]) -> list[str]:
    """One prompt per (colour, digit) pair."""
    return [template.format(color=color, digit=digit) for color, digit in pairs]


def read_prompt(prompt: str) -> tuple[str | None, str | None]:
    """The (colour, digit) a prompt asks for; `None` where it names none."""
    words = re.findall(r"[a-z]+", prompt.lower())
    return next((w for w in words if w in COLORS), None), next((w for w in words if w in DIGITS), None)


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows every word of the templates as one token and spells all others in bytes.

    Byte-pair merges build each word letter by letter; longer words come first, because a merge that belongs to a short
    word ("r e" of "red") would otherwise cut a longer one ("three") in two.
    """
    alphabet = sorted(ByteLevel.alphabet())
    words = sorted({*DIGITS, *COLORS, *_FILLERS, *RARE_TOKENS}, key=lambda word: (-len(word), word))
    merges: list[tuple[str, str]] = []
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        prefix = pieces[0]
        for piece in pieces[1:]:
            if (prefix, piece) not in merges:
                merges.append((prefix, piece))
            prefix += piece
            if prefix not in tokens:
                tokens.append(prefix)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = byte_pair_tokenizer(CLIPTokenizer, vocabulary, merges, model_max_length=PROMPT_LENGTH)
    broken = [word for word in words if len(tokenizer(word, add_special_tokens=False).input_ids) != 1]
    if broken:
        raise ValueError(f"Every word of the templates must be one token, got several for {broken}.")
    return tokenizer
