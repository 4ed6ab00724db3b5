"""Parts of the networks: positions of patches, transformer blocks with a past, and how a prompt is read."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

KeysValues = tuple[torch.Tensor, torch.Tensor]


def patch_positions(
    rows: int, columns: int, width: int, max_frequency: float, device: torch.device | None = None
) -> torch.Tensor:
    """Sine-cosine position of every patch, from its centre as a fraction of the picture's sides.

    The fixed 2-D form of "Attention Is All You Need" (Vaswani et al., 2017, section 3.5), with `u = (index + 0.5) /
    count` in place of the index: sin and cos of `2 pi f u` per axis, the frequencies f spaced geometrically from 1/2
    cycle to `max_frequency` cycles a side.

    Args:
        width: length of a position, a multiple of 4.
        max_frequency: half the patches of a side at the size trained at, the finest wave that these patches can tell
            apart. Another size then samples the same waves more or less densely.

    Returns:
        `(rows * columns, width)` float32, row by row.
    """
    if width % 4:
        raise ValueError(f"`width` must be a multiple of 4 for 2-D positions, got {width}.")
    highest = math.log2(max(max_frequency, 0.5))
    frequencies = torch.logspace(-1, highest, width // 4, base=2.0, device=device)
    waves = []
    for count in (rows, columns):
        centres = (torch.arange(count, device=device) + 0.5) / count
        phases = 2 * math.pi * centres[:, None] * frequencies
        waves.append(torch.cat([phases.sin(), phases.cos()], 1))
    grid = (rows, columns, width // 2)
    vertical = waves[0][:, None].expand(grid)
    horizontal = waves[1][None, :].expand(grid)
    return torch.cat([vertical, horizontal], 2).flatten(0, 1)


class MultiHeadAttention(nn.Module):
    """softmax(Q K^T / sqrt(dim per head)) V over several heads ("Attention Is All You Need", 2017)."""

    def __init__(self, width: int, num_heads: int, context_width: int | None = None) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"`num_heads` must divide the width {width} of the tokens, got {num_heads}.")
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
        self, width: int, num_heads: int, feedforward: int, dropout: float = 0.0, context_width: int | None = None
    ) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = MultiHeadAttention(width, num_heads)
        self.norm_cross = self.cross_attention = None
        if context_width is not None:
            self.norm_cross = nn.LayerNorm(width)
            self.cross_attention = MultiHeadAttention(width, num_heads, context_width)
        self.norm_feedforward = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(nn.Linear(width, feedforward), nn.GELU(), nn.Linear(feedforward, width))
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


class ReadText(NamedTuple):
    """A batch of prompts as the networks see them; the first token of each is the learned one."""

    tokens: torch.Tensor  # (batch, 1 + tokens, width)
    mask: torch.Tensor | None  # bool (batch, 1, 1, 1 + tokens), true where a token is read


class TextReader(nn.Module):
    """Project text embeddings to `width` and let the tokens see each other.

    A learned token that is always read comes first: attention then has something to read also where a mask hides every
    token of a prompt.
    """

    def __init__(
        self,
        text_embed_dim: int,
        width: int,
        *,
        num_layers: int,
        num_heads: int,
        feedforward: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(text_embed_dim)
        self.project = nn.Linear(text_embed_dim, width)
        self.first_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, feedforward, dropout) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(self, text_embed: torch.Tensor, attention_mask: torch.Tensor | None) -> ReadText:
        """Args: `text_embed` `(batch, tokens, dim)`; `attention_mask` `(batch, tokens)` or `None`."""
        first = self.first_token.expand(len(text_embed), -1, -1)
        tokens = torch.cat([first, self.project(self.norm_in(text_embed))], 1)
        mask = None
        if attention_mask is not None:
            mask = F.pad(attention_mask != 0, (1, 0), value=True)[:, None, None]
        for block in self.blocks:
            tokens, _ = block(tokens, mask=mask)
        return ReadText(self.norm_out(tokens), mask)


class AttentionPooling(nn.Module):
    """One vector per prompt: the first token's view of all tokens, through a small MLP."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(width, num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, text: ReadText) -> torch.Tensor:
        """Returns `(batch, width)`."""
        pooled, _ = self.attention(text.tokens[:, :1], text.tokens, mask=text.mask)
        return self.mlp(pooled[:, 0])
