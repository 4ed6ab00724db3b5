"""Pre-norm transformer blocks that can continue a sequence from the keys and values of its past."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


KeysValues = tuple[torch.Tensor, torch.Tensor]


class MultiHeadAttention(nn.Module):
    """softmax(Q K^T / sqrt(dim per head)) V over several heads ("Attention Is All You Need", 2017)."""

    def __init__(self, width: int, num_heads: int, context_width: int | None = None) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(
                f"`num_heads` must divide the width {width} of the tokens, got {num_heads}."
            )
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(context_width or width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def forward(
        self,
        tokens: torch.Tensor,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        past: KeysValues | None = None,
    ) -> tuple[torch.Tensor, KeysValues]:
        """Attend from `tokens` to `context`, or to themselves and `past`.

        Args:
            tokens: `(batch, tokens, width)`.
            context: `(batch, context_tokens, context_width)`; `tokens` when `None`.
            past: keys and values that come before those of `context`.

        Returns:
            The result, and all keys and values, each `(batch, heads, keys, dim per head)`.
        """
        context = tokens if context is None else context
        query = self._split(self.to_q(tokens))
        key, value = (self._split(x) for x in self.to_kv(context).chunk(2, dim=2))
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(result.transpose(1, 2).flatten(2)), (key, value)

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention if there is a context, feed-forward; each normed, each a residual."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        feedforward: int,
        dropout: float = 0.0,
        context_width: int | None = None,
    ) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = MultiHeadAttention(width, num_heads)
        self.norm_cross = self.cross_attention = None
        if context_width is not None:
            self.norm_cross = nn.LayerNorm(width)
            self.cross_attention = MultiHeadAttention(width, num_heads, context_width)
        self.norm_feedforward = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, feedforward), nn.GELU(), nn.Linear(feedforward, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        past: KeysValues | None = None,
    ) -> tuple[torch.Tensor, KeysValues]:
        """Shapes as in `MultiHeadAttention`; `mask` and `past` belong to the self-attention."""
        change, keys_values = self.self_attention(self.norm_self(tokens), mask=mask, past=past)
        tokens = tokens + self.dropout(change)
        if self.cross_attention is not None:
            normed = self.norm_cross(tokens)
            change, _ = self.cross_attention(normed, context, mask=context_mask)
            tokens = tokens + self.dropout(change)
        change = self.feedforward(self.norm_feedforward(tokens))
        return tokens + self.dropout(change), keys_values
