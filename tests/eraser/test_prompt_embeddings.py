from __future__ import annotations

import logging

import pytest
import torch

from diffusers_ext.eraser.batch import encode_video_prompts
from examples.moving_digits.prompts import PROMPT_LENGTH
from tests.tiny_cogvideox import TEXT_WIDTH, tiny_video_pipeline

PROMPTS = ["a red seven moving right", "", "the blue one goes up", ""]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_video_pipeline()


def test_the_embeddings_are_the_pipelines_own(pipeline):
    expected, negative = pipeline.encode_prompt(PROMPTS, max_sequence_length=PROMPT_LENGTH)
    found = encode_video_prompts(pipeline, PROMPTS, batch_size=2)
    assert found.shape == (4, PROMPT_LENGTH, TEXT_WIDTH)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1::2], negative[:2], rtol=1e-5, atol=1e-6)
    assert not found.requires_grad
    assert not torch.equal(found[0], found[2])


def test_repeated_prompts_are_encoded_once_and_the_modes_come_back(pipeline, monkeypatch):
    encoder, rows = pipeline.text_encoder, []
    block = encoder.encoder.block[0]
    handle = encoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        block.train()
        found = encode_video_prompts(pipeline, PROMPTS)
        assert block.training
        assert not encoder.training
    finally:
        block.eval()
        handle.remove()
    assert rows == [3]
    assert torch.equal(found, encode_video_prompts(pipeline, PROMPTS[:3])[[0, 1, 2, 1]])  # dropout was off


def test_the_dtype_is_the_encoders():
    pipeline = tiny_video_pipeline()
    pipeline.text_encoder.to(torch.bfloat16)
    found = encode_video_prompts(pipeline, ["a seven"])
    assert found.dtype == torch.bfloat16


def test_cut_prompts_are_told(pipeline, caplog):
    caplog.set_level(logging.WARNING)
    long = [" ".join([prompt] * 4) for prompt in PROMPTS]
    assert encode_video_prompts(pipeline, long).shape[1] == PROMPT_LENGTH
    assert f"2 prompts are cut at {PROMPT_LENGTH} tokens, the first is {long[0]!r}" in caplog.text


def test_embeddings_that_are_not_finite():
    pipeline = tiny_video_pipeline()
    pipeline.text_encoder.shared.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="must give finite embeddings, got others in torch.float32"):
        encode_video_prompts(pipeline, ["a seven"])


@pytest.mark.parametrize("prompts", [[], "a seven"])
def test_no_list_of_prompts(pipeline, prompts):
    with pytest.raises(ValueError, match="must be a list of at least one prompt, got"):
        encode_video_prompts(pipeline, prompts)
