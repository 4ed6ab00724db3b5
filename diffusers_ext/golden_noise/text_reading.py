"""How sequence networks read a prompt: tokens of their own width, and one vector pooled from these."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_ext.golden_noise.cached_attention import MultiHeadAttention, TransformerBlock


class ReadText(NamedTuple):
    """A batch of prompts as the networks see them; the first token of each is the learned one."""

    tokens: torch.Tensor  # (batch, 1 + tokens, width)
    mask: torch.Tensor | None  # bool (batch, 1, 1, 1 + tokens), true where a token is read


class TextReader(nn.Module):
    """Project text embeddings to `width` and let the tokens see each other.

    A learned token that is always read comes first: attention then has something to read also where
    a mask hides every token of a prompt.
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
