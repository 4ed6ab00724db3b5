from __future__ import annotations

import sys

import pytest
import torch

from diffusers_ext.rewards.hpsv2 import clean_prompt, token_ids
from tests.rewards.hpsv2_fixtures import CASES, PROMPTS, clip_tokenizer, official_tensors


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer()


@pytest.mark.parametrize("case", CASES["prompts"], ids=lambda case: case["name"])
def test_prompts_are_cleaned_as_officially(case):
    assert clean_prompt(case["text"]) == case["cleaned"]


@pytest.mark.parametrize("case", CASES["prompts"], ids=lambda case: case["name"])
def test_tokens_are_the_official_ones(case, tokenizer):
    ids = token_ids(tokenizer, [case["text"]])
    padding = [0] * (77 - len(case["ids"]))
    assert ids.tolist() == [case["ids"] + padding]


def test_a_batch_of_prompts_has_the_tokens_of_each(tokenizer):
    ids = token_ids(tokenizer, PROMPTS)
    assert ids.dtype == torch.long
    assert torch.equal(ids, official_tensors()["input_ids"].long())


def test_the_tokenizer_alone_reads_three_of_the_prompts_otherwise(tokenizer):
    differ = {
        case["name"]
        for case in CASES["prompts"]
        if tokenizer(case["text"], truncation=True, max_length=77).input_ids != case["ids"]
    }
    assert differ == {"non_ascii", "html", "mojibake_fullwidth"}


def test_a_longer_prompt_ends_with_the_end_token(tokenizer):
    ids = token_ids(tokenizer, ["a " * 30, ""], length=8)
    assert ids[0, 0] == 49406
    assert ids[0, -1] == 49407
    assert ids[1].tolist() == [49406, 49407, 0, 0, 0, 0, 0, 0]


def test_without_ftfy_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusers_ext\[rewards\]'"):
        clean_prompt("a cat")
