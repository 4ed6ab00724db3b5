from __future__ import annotations

import pytest
import torch

from diffusers_ext.golden_noise.networks.blocks import MultiHeadAttention, TransformerBlock


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
