"""Which token of a prompt stands where which of another does."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.families.token_alignment import aligned, token_alignment
from tests.tiny_image_pipelines import tiny_sd3_pipeline


@pytest.mark.parametrize(
    ("target", "anchor", "places"),
    [
        ([0, 5, 7, 9], [0, 5, 8, 9], [0, 1, 2, 3, 4, 5]),
        ([0, 7, 9], [0, 4, 8, 9], [0, 2, 3, 4, 5, 5]),  # the phrase's last token, then its end and padding
        ([0, 4, 7, 9], [0, 8, 9], [0, 1, 1, 2, 3, 4]),
        ([0, 7, 9], [0, 9], [0, 1, 1, 2, 3, 4]),
    ],
)
def test_tokens_between_common_ends_are_aligned_by_the_last(target, anchor, places):
    assert aligned(target, anchor, 6).tolist() == places


def test_encoders_whose_tokens_follow_each_other_are_aligned_one_by_one():
    pipeline = tiny_sd3_pipeline()
    places = token_alignment(pipeline, ["a red three"], ["a red blue nine"], 16 + 256)
    assert places[0, :6].tolist() == [0, 1, 2, 4, 5, 6]
    first = len(pipeline.tokenizer_3("a red three").input_ids) - 2
    assert places[0, 16 + first] == 16 + first + 1


def test_pooled_text_has_one_place():
    assert torch.equal(token_alignment(tiny_sd3_pipeline(), ["a three"], ["a red nine"], 1), torch.zeros(1, 1).long())
