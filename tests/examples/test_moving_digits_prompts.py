"""Prompts of the moving digits: words, templates, tokens, and what was kept out of training."""

from __future__ import annotations

import re

import pytest
from transformers import AutoTokenizer

from diffusers_ext.eraser.concepts import concept_token_mask
from examples.moving_digits import prompts
from examples.moving_digits.check_model import MODEL_DIR
from examples.moving_digits.prompts import (
    COLORS,
    COMBINATIONS,
    DIGITS,
    DIRECTIONS,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_TEMPLATE,
    PARAPHRASES,
    PROMPT_LENGTH,
    TEMPLATES,
    make_tokenizer,
    read_prompt,
    write_prompts,
)

EVERY_TEMPLATE = (*TEMPLATES, HELD_OUT_TEMPLATE, *PARAPHRASES)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_every_word_of_every_template_is_one_token(tokenizer):
    words = {w for t in EVERY_TEMPLATE for w in re.findall(r"[a-z]+", re.sub(r"{\w+}", "", t))}
    for word in (*words, *DIGITS, *COLORS, *DIRECTIONS, "digit", "colored"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word


def test_other_words_are_spelled_and_strange_letters_are_not_known(tokenizer):
    assert len(tokenizer("quick", add_special_tokens=False).input_ids) == 6  # with the blank before
    assert tokenizer.unk_token_id in tokenizer("é").input_ids


def test_every_prompt_fits_into_the_text_length(tokenizer):
    longest = write_prompts(templates=EVERY_TEMPLATE)
    assert max(len(ids) for ids in tokenizer(longest).input_ids) <= PROMPT_LENGTH


def test_the_concept_is_found_in_every_template(tokenizer):
    asked = write_prompts(digits=("seven",), templates=EVERY_TEMPLATE)
    found = concept_token_mask(tokenizer, asked, "seven", PROMPT_LENGTH).sum(dim=1)
    assert found.tolist() == [prompt.split().count("seven") for prompt in asked]


def test_a_word_that_is_not_one_token_is_an_error(monkeypatch):
    monkeypatch.setattr(prompts, "_FILLERS", (*prompts._FILLERS, "two words"))
    with pytest.raises(ValueError, match="must be one token, got several for .*two words"):
        make_tokenizer()


def test_the_bundled_tokenizer_is_the_one_the_code_makes(tokenizer):
    bundled = AutoTokenizer.from_pretrained(MODEL_DIR / "tokenizer")
    assert bundled.get_vocab() == tokenizer.get_vocab()
    assert bundled("a red seven").input_ids == tokenizer("a red seven").input_ids


def test_prompts_say_what_they_were_written_with():
    for template in EVERY_TEMPLATE:
        for color, digit, direction in (*COMBINATIONS, *HELD_OUT_COMBINATIONS):
            prompt = template.format(color=color, digit=digit, direction=direction)
            assert read_prompt(prompt) == (color, digit, direction)
    assert read_prompt("A Colored digit") == (None, None, None)
    assert read_prompt("") == (None, None, None)


def test_write_prompts_gives_each_combination_once():
    asked = write_prompts(colors=("red", "blue"), digits=("six",))
    assert len(asked) == len(set(asked)) == len(TEMPLATES) * 2 * len(DIRECTIONS)
    assert all(read_prompt(prompt).digit == "six" for prompt in asked)


def test_held_out_combinations_and_templates_are_apart():
    assert not set(COMBINATIONS) & set(HELD_OUT_COMBINATIONS)
    assert len(COMBINATIONS) == 160
    assert len(HELD_OUT_COMBINATIONS) == 40
    assert not set(TEMPLATES) & {HELD_OUT_TEMPLATE, *PARAPHRASES}
