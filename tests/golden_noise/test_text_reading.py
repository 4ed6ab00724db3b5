from __future__ import annotations

import pytest
import torch

from diffusers_ext.golden_noise.networks.blocks import AttentionPooling, TextReader


def reader(num_layers: int = 1) -> TextReader:
    torch.manual_seed(0)
    return TextReader(6, 16, num_layers=num_layers, num_heads=2, feedforward=24).eval()


@pytest.mark.parametrize("num_layers", [0, 2])
def test_hidden_tokens_are_read_neither_by_tokens_nor_by_the_pooled_vector(num_layers):
    read, pool = reader(num_layers), AttentionPooling(16, 2)
    text, mask = torch.randn(2, 5, 6), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    other = torch.where(mask[:, :, None] == 0, torch.zeros_like(text), text)
    one, two = read(text, mask), read(other, mask)
    assert one.tokens.shape == (2, 6, 16)
    assert torch.equal(
        one.mask[:, 0, 0], torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]) > 0
    )
    seen = one.mask[:, 0, 0]
    assert torch.equal(one.tokens[seen], two.tokens[seen])
    assert torch.equal(pool(one), pool(two))
    assert pool(one).shape == (2, 16)
    assert (pool(read(text, None)) - pool(one)).abs().max() > 1e-4


def test_a_prompt_without_a_visible_token_is_the_learned_one():
    read, pool = reader(), AttentionPooling(16, 2)
    text = torch.randn(2, 5, 6)
    hidden = read(text, torch.zeros(2, 5))
    assert hidden.tokens.isfinite().all()
    pooled = pool(hidden)
    torch.testing.assert_close(pooled[0], pooled[1])


def test_the_scale_of_the_embeddings_does_not_matter():
    read, text = reader(), torch.randn(2, 5, 6)
    torch.testing.assert_close(
        read(text * 300, None).tokens, read(text, None).tokens, atol=1e-3, rtol=1e-3
    )
