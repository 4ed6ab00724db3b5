from __future__ import annotations

import argparse

import pytest
import torch

from diffusers_ext.golden_noise.pairs.dataset import open_pairs
from diffusers_ext.training.golden_noise.data import (
    NoiseSamples,
    count_steps,
    data_facts,
    sequence_steps,
    split_by_prompt,
    target_steps,
)
from tests.training.noise_sets import PROMPTS, SHAPE, write_noises


def args(**values) -> argparse.Namespace:
    usual = {"max_train_steps": None, "gradient_accumulation_steps": 1, "train_batch_size": 4}
    return argparse.Namespace(**{**usual, **values})


def test_no_prompt_is_on_both_sides():
    prompts = [f"prompt {index % 10}" for index in range(40)]
    split = split_by_prompt(prompts, 0.2, seed=0)
    sides = [{prompts[index] for index in side} for side in split]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 2
    assert sorted(split.train + split.validation) == list(range(40))
    assert split_by_prompt(prompts, 0.2, seed=0) == split
    assert split_by_prompt(prompts, 0.2, seed=1) != split
    turned = split_by_prompt(prompts[::-1], 0.2, seed=0)
    assert {prompts[::-1][index] for index in turned.validation} == sides[1]


def test_one_prompt_at_least_is_held_out_unless_none_is_asked_for():
    prompts = ["a", "b", "c"]
    assert len(split_by_prompt(prompts, 0.01, 0).validation) == 1
    assert split_by_prompt(prompts, 0.0, 0) == ([0, 1, 2], [])
    for share in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"`validation_split` must be in \[0, 1\), got"):
            split_by_prompt(prompts, share, 0)
    with pytest.raises(ValueError, match="must leave prompts to train on, got 0.05 of 1 different"):
        split_by_prompt(["a", "a"], 0.05, 0)


def test_a_sample_has_its_own_text_and_the_chosen_steps(tmp_path):
    pairs = open_pairs(write_noises(tmp_path / "set", 3, count=8))
    rows = {prompt: row for row, prompt in enumerate(reversed(PROMPTS))}
    samples = NoiseSamples(pairs, [1, 6], rows, [1, 3])
    assert len(samples) == 2
    sample = samples[1]
    assert sample["text"] == rows[PROMPTS[6 % 4]]
    assert torch.equal(sample["noise"], pairs[6]["noise"])
    assert torch.equal(sample["golden"], pairs[6]["golden"][[0, 2]])
    assert sample["golden"].shape == (2, *SHAPE)


def test_steps_of_the_command_line():
    assert target_steps(args(target_step="last"), 5) == [5]
    assert target_steps(args(target_step="2"), 5) == [2]
    for step in ("0", "6", "first"):
        with pytest.raises(ValueError, match=f"must be 'last' or from 1 to the data's 5, got {step}"):
            target_steps(args(target_step=step), 5)
    assert sequence_steps(args(max_seq_len=None), 5) == [1, 2, 3, 4, 5]
    assert sequence_steps(args(max_seq_len=4), 5) == [1, 2, 3]


def test_steps_of_a_run():
    assert count_steps(args(max_train_steps=7, num_epochs=3), 100, 1) == 7
    assert count_steps(args(num_epochs=3), 10, 1) == 8
    assert count_steps(args(num_epochs=3, gradient_accumulation_steps=2), 10, 2) == 2


def test_facts_tell_one_set_from_another(tmp_path):
    first = open_pairs(write_noises(tmp_path / "first", count=8))
    fewer = open_pairs(write_noises(tmp_path / "fewer", count=4))
    split = split_by_prompt(first.prompts, 0.25, 0)
    assert data_facts(first, split, [1]) != data_facts(fewer, split, [1])
    assert data_facts(first, split, [1])["training_samples"] == 6
