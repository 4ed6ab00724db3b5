from __future__ import annotations

import math

import pytest
import torch

from diffusers_ext.golden_noise.networks.golden_noise_model import (
    AttentionPooling,
    MultiHeadAttention,
    TextReader,
    TransformerBlock,
    patch_positions,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_attention_of_torch():
    torch.manual_seed(0)
    attention = MultiHeadAttention(16, 4)
    reference = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([attention.to_q.weight, attention.to_kv.weight]))
        reference.in_proj_bias.copy_(torch.cat([attention.to_q.bias, attention.to_kv.bias]))
        reference.out_proj.load_state_dict(attention.to_out.state_dict())
    tokens, mask = draw(2, 5, 16), torch.ones(5, 5).tril().bool()
    expected, _ = reference(tokens, tokens, tokens, attn_mask=~mask, need_weights=False)
    torch.testing.assert_close(attention(tokens, mask=mask)[0], expected)


def test_a_block_continues_from_past_keys_and_values():
    torch.manual_seed(0)
    block = TransformerBlock(16, 2, 24, context_width=6)
    tokens, context = draw(2, 7, 16), draw(2, 3, 6, seed=1)
    whole, _ = block(tokens, context, mask=torch.ones(7, 7).tril().bool())
    past, parts = None, []
    for index in range(7):
        part, past = block(tokens[:, index : index + 1], context, past=past)
        parts.append(part)
    assert past[0].shape == (2, 2, 7, 8)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_masked_context_is_not_read():
    torch.manual_seed(0)
    block = TransformerBlock(16, 2, 24, context_width=6)
    tokens, context = draw(2, 4, 16), draw(2, 3, 6, seed=1)
    mask = torch.tensor([True, True, False])[None, None, None]
    changed = context.clone()
    changed[:, 2] = 5.0
    found = block(tokens, context, context_mask=mask)[0]
    assert torch.equal(block(tokens, changed, context_mask=mask)[0], found)
    assert not torch.equal(block(tokens, changed)[0], found)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_must_divide_the_width(heads):
    with pytest.raises(ValueError, match=f"`num_heads` must divide the width 16 .*, got {heads}"):
        MultiHeadAttention(16, heads)


def test_every_patch_has_its_own_position():
    places = patch_positions(5, 7, 32, 4.0)
    assert places.shape == (35, 32)
    distances = torch.cdist(places, places) + 100 * torch.eye(35)
    assert distances.min() > 0.1


def test_the_first_wave_is_half_a_cycle_a_side():
    places = patch_positions(4, 2, 16, 4.0).unflatten(0, (4, 2))
    centres = (torch.arange(4) + 0.5) / 4
    torch.testing.assert_close(places[:, 0, 0], (math.pi * centres).sin())
    torch.testing.assert_close(places[:, 0, 4], (math.pi * centres).cos())
    torch.testing.assert_close(places[0, :, 3], places[0, :, 3].mean().expand(2))


@pytest.mark.parametrize("factor", [3, 5])
def test_other_sizes_sample_the_same_waves(factor):
    coarse = patch_positions(4, 6, 16, 3.0).unflatten(0, (4, 6))
    fine = patch_positions(4 * factor, 6 * factor, 16, 3.0).unflatten(0, (4 * factor, 6 * factor))
    middle = factor // 2
    torch.testing.assert_close(fine[middle::factor, middle::factor], coarse, atol=1e-5, rtol=1e-5)


def test_a_single_patch():
    assert patch_positions(1, 1, 8, 0.5).isfinite().all()


def test_widths_that_are_no_multiple_of_four_are_refused():
    with pytest.raises(ValueError, match="`width` must be a multiple of 4 .*, got 6"):
        patch_positions(2, 2, 6, 1.0)


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
    assert torch.equal(one.mask[:, 0, 0], torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]) > 0)
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
    torch.testing.assert_close(read(text * 300, None).tokens, read(text, None).tokens, atol=1e-3, rtol=1e-3)
