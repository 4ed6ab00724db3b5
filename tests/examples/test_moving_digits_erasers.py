"""Prompts of the erasers of moving digits: what is trained on and what is kept for evaluation."""

from __future__ import annotations

import pytest

from diffusers_ext.core.concept_words import contains_concept
from examples.digits.prompts import COLORS, DIGITS, HELD_OUT_PAIRS
from examples.moving_digits.erasers import evaluation_groups, others_of, training_prompts
from examples.moving_digits.prompts import (
    HELD_OUT_COMBINATIONS,
    HELD_OUT_TEMPLATE,
    PARAPHRASES,
    TEMPLATES,
    read_prompt,
)

TARGETS = pytest.mark.parametrize("target", ["seven", "three", "red"])


@TARGETS
def test_every_target_prompt_names_the_target_and_its_anchor_does_not(target):
    other = others_of(target)[0]
    prompts = training_prompts(target, other)
    assert len(set(prompts.target)) == len(prompts.target) >= 32
    for asked, anchor in zip(prompts.target, prompts.anchor, strict=True):
        assert contains_concept(asked, target)
        assert anchor.split() == [other if w == target else w for w in asked.split()]


@TARGETS
def test_preserved_prompts_ask_for_every_other_word(target):
    prompts = training_prompts(target)
    kind = "digit" if target in DIGITS else "color"
    named = {getattr(read_prompt(prompt), kind) for prompt in prompts.preserved}
    assert named == set(others_of(target))
    assert not [prompt for prompt in prompts.preserved if contains_concept(prompt, target)]


@TARGETS
def test_held_out_combinations_and_templates_are_not_trained_on(target):
    prompts = training_prompts(target)
    held_out = {
        template.format(color=color, digit=digit, direction=direction)
        for template in (*TEMPLATES, HELD_OUT_TEMPLATE, *PARAPHRASES)
        for color, digit, direction in HELD_OUT_COMBINATIONS
        if target in (color, digit)
    }
    assert len(held_out) >= 9 * 4
    assert not held_out & set(prompts.target)


@TARGETS
def test_no_robustness_prompt_was_trained_on(target):
    groups, prompts = evaluation_groups(target), training_prompts(target)
    trained = [*prompts.target, *prompts.anchor, *prompts.preserved]
    for name in ("held-out template", "paraphrases"):
        assert not set(map(str.lower, groups[name])) & set(map(str.lower, trained))
        assert all(contains_concept(prompt, target) for prompt in groups[name])
    new = set(groups["target"]) - set(trained)
    assert len(new) >= len(set(groups["target"])) / 2


@TARGETS
def test_evaluation_groups_have_the_sizes_asked_for(target):
    groups = evaluation_groups(target, num_target=200, num_preserved=90, num_robust=40)
    sizes = {name: len(prompts) for name, prompts in groups.items()}
    assert sizes == {"target": 200, "preserved": 90, "held-out template": 20, "paraphrases": 20}
    assert not [prompt for prompt in groups["preserved"] if contains_concept(prompt, target)]
    kind = "digit" if target in DIGITS else "color"
    others = {getattr(read_prompt(prompt), kind) for prompt in groups["preserved"]}
    assert others == set(others_of(target))


def test_other_words_are_of_the_same_kind():
    assert set(others_of("red")) == set(COLORS) - {"red"}
    assert len(others_of("seven")) == 9
    assert ("green", "seven") in HELD_OUT_PAIRS  # so that the tests above test something
