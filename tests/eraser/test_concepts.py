from __future__ import annotations

import logging
import types

import pytest
import torch

from diffusers_ext.eraser.concepts import (
    check_concept,
    concept_spans,
    concept_token_mask,
    contains_concept,
    replace_concept,
)
from examples.moving_digits.prompts import PROMPT_LENGTH, make_tokenizer

TOKENIZER = make_tokenizer()


def marked(prompt: str, concept: str, length: int = PROMPT_LENGTH) -> list[str]:
    """The tokens that the mask marks."""
    mask = concept_token_mask(TOKENIZER, [prompt], concept, length)[0]
    ids = TOKENIZER(prompt, padding="max_length", max_length=length, truncation=True).input_ids
    return [token for token, on in zip(TOKENIZER.convert_ids_to_tokens(ids), mask) if on]


@pytest.mark.parametrize(
    ("prompt", "concept", "found"),
    [
        ("a red seven", "seven", ["seven"]),
        ("Seven. (SEVEN) seven's", "seven", ["Seven", "SEVEN", "seven"]),
        ("a panda  Bear runs", " panda bear ", ["panda  Bear"]),
        ("a scarf, a carpet, cars and a car", "car", ["car"]),
        ("C++, not C+", "c++", ["C++"]),
        ("a red eight", "seven", []),
        ("", "seven", []),
    ],
)
def test_whole_words_in_any_case(prompt, concept, found):
    assert [prompt[start:end] for start, end in concept_spans(prompt, concept)] == found
    assert contains_concept(prompt, concept) == bool(found)


@pytest.mark.parametrize(
    ("prompt", "concept", "other", "expected"),
    [
        ("a red seven moving, seven!", "seven", "digit", "a red digit moving, digit!"),
        ("Seven goes up", "seven", "digit", "Digit goes up"),
        ("by Van Gogh", "Van Gogh", "a painter", "by a painter"),
        ("a van  gogh", "Van Gogh", "painter", "a painter"),
        ("a panda in panda land", "panda", "bear", "a bear in bear land"),
        ("a car on a scarf", "car", r"\1 \g<0>", r"a \1 \g<0> on a scarf"),
    ],
)
def test_only_the_concept_is_replaced(prompt, concept, other, expected):
    assert replace_concept(prompt, concept, other) == expected


@pytest.mark.parametrize(
    ("prompt", "concept", "other", "message"),
    [
        ("two sevens", "seven", "digit", "must contain 'seven' as a whole word, got 'two sevens'"),
        ("a seven", "seven", " ", "must be words without 'seven' among them, got ' '"),
        ("a seven", "seven", "no Seven", "among them, got 'no Seven'"),
        ("a seven", "  ", "digit", "`concept` must be a word or a few words, got '  '"),
    ],
)
def test_replacements_that_mean_nothing(prompt, concept, other, message):
    with pytest.raises(ValueError, match=message):
        replace_concept(prompt, concept, other)


def test_the_tokens_of_the_concept_are_marked(subtests):
    for prompt, concept, expected in [
        ("seven goes up", "seven", ["▁seven"]),
        ("a red seven goes up", "red seven", ["▁red", "▁seven"]),
        ("a seven a seven", "seven", ["▁seven", "▁seven"]),
        ("seven, up", "seven", ["▁seven"]),
        ("seven-up", "up", ["u", "p"]),  # other tokens than "up" alone
        ("a (cat)", "cat", ["c", "a", "t"]),
        ("sevens", "seven", []),  # begins with the token of "seven"
        ("a red eight", "seven", []),
        ("", "seven", []),
    ]:
        with subtests.test(prompt=prompt, concept=concept, expected=expected):
            assert marked(prompt, concept) == expected


def test_a_capital_letter_makes_other_tokens_of_the_same_word():
    assert marked("Seven goes up", "seven") == ["▁", "<unk>", "e", "v", "e", "n"]


def test_the_rows_of_a_batch_are_the_prompts():
    mask = concept_token_mask(TOKENIZER, ["", "a red seven", "seven up"], "seven", 6)
    assert mask.dtype == torch.bool
    assert mask.nonzero().tolist() == [[1, 2], [2, 0]]
    assert mask.shape == (3, 6)


def test_a_concept_behind_the_last_token(caplog):
    caplog.set_level(logging.WARNING)
    assert marked("a red seven", "seven", length=3) == []
    assert "'seven' lies behind the last token of 'a red seven'" in caplog.text


@pytest.mark.parametrize(
    ("concept", "message"),
    [
        ("日本", r"can spell, got '日本', which it reads as \['▁', '日本'\]"),
        ("Seven", "got 'Seven', .* Write it in the letters and the case"),
        ("", "`concept` must be words that the tokenizer can spell, got ''"),
    ],
)
def test_a_concept_out_of_the_tokenizers_reach(concept, message):
    with pytest.raises(ValueError, match=message):
        check_concept(TOKENIZER, concept)
    with pytest.raises(ValueError, match=message):
        concept_token_mask(TOKENIZER, ["a seven"], concept, PROMPT_LENGTH)


def test_a_tokenizer_without_offsets_and_one_string_for_prompts():
    with pytest.raises(TypeError, match="must give offsets of its tokens, got SimpleNamespace"):
        concept_token_mask(types.SimpleNamespace(is_fast=False), ["a seven"], "seven", 4)
    with pytest.raises(ValueError, match="must be a list of prompts, got the string 'a seven'"):
        concept_token_mask(TOKENIZER, "a seven", "seven", 4)
