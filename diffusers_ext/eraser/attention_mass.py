"""Attention that video tokens pay to chosen text tokens, and which heads pay it where it matters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb


Rotary = tuple[torch.Tensor, torch.Tensor]


def attention_mass(
    query: torch.Tensor, key: torch.Tensor, token_mask: torch.Tensor, *, chunk_size: int = 1024
) -> torch.Tensor:
    """Share of the video tokens' attention that lands on chosen text tokens, head by head.

    `sum over concept tokens j of softmax_j(q_i k_j^T / sqrt(head_dim))`, the softmax over all text
    and video keys: the output of the same attention with `value_j = 1` at the concept's tokens and
    0 elsewhere, so that fused kernels compute it and no score matrix is kept.

    Args:
        query, key: `(batch, heads, text + video, head_dim)`, text first, after normalisation and
            rotary embedding.
        token_mask: `(batch, text)` bool, true at the concept's tokens.
        chunk_size: video queries at a time; it bounds the scores where no fused kernel serves.

    Returns:
        `(batch, heads, video)` float32, from 0 to 1.
    """
    text = token_mask.shape[1]
    # As wide as the keys: flash kernels ask for one width.
    value = key.new_zeros(key.shape[0], 1, *key.shape[2:])
    value[:, 0, :text, 0] = token_mask.to(key)
    value = value.expand(-1, key.shape[1], -1, -1)
    chunks = query[:, :, text:].split(chunk_size, dim=2)
    shares = [F.scaled_dot_product_attention(chunk, key, value)[..., 0].float() for chunk in chunks]
    return torch.cat(shares, dim=2)


def rotate_video(features: torch.Tensor, rotary: Rotary | None, text: int) -> torch.Tensor:
    """Rotary embedding of the video part of queries or keys, as CogVideoX applies it.

    `features` are `(batch, heads, text + video, head_dim)` and not written to; `rotary` is `(cos,
    sin)`, each `(video, head_dim)`, or `None` for absolute positions.
    """
    if rotary is None:
        return features
    turned = apply_rotary_emb(features[:, :, text:], rotary)
    return torch.cat([features[:, :, :text], turned], dim=2)


def standardize(maps: torch.Tensor) -> torch.Tensor:
    """Maps `(..., video)` with mean 0 and deviation 1 over their tokens; constant ones become 0."""
    centred = maps - maps.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()
    return torch.where(deviation > 0, centred / torch.where(deviation > 0, deviation, 1), 0)


def head_correlations(head_maps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of each head's map with a reference, over the tokens of each clip.

    From `(batch, layers, heads, video)` and `(batch, video)`, such as the difference that a concept
    makes to the velocity, to `(batch, layers, heads)` float32.
    """
    if head_maps.ndim != 4 or reference.shape != (len(head_maps), head_maps.shape[-1]):
        raise ValueError(
            "`reference` must be (batch, video) like `head_maps`, "
            f"{tuple(head_maps.shape)}, got {tuple(reference.shape)}."
        )
    pattern = standardize(reference.float())[:, None, None]
    return (standardize(head_maps.float()) * pattern).mean(dim=-1)


def agreement_weights(correlations: torch.Tensor) -> torch.Tensor:
    """How much each head counts: its mean correlation with the reference, or 0 if negative.

    From `(batch, layers, heads)` to `(layers, heads)` weights that add up to 1.

    Raises:
        ValueError: no head agrees with the reference.
    """
    weights = correlations.mean(dim=0).clamp(min=0)
    if not (weights > 0).any():
        raise ValueError(
            "`correlations` must be above 0 for some head, got none. Where the anchor prompts are the "
            "prompts themselves, the concept changes nothing."
        )
    return weights / weights.sum()
