"""CogVideoX's attention written out with whole matrices, for clips of 2x3x4 tokens and 5 text tokens."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed

TEXT, GRID = 5, (2, 3, 4)
VIDEO = 2 * 3 * 4


def rotary():
    return get_3d_rotary_pos_embed(16, ((0, 0), GRID[1:]), grid_size=GRID[1:], temporal_size=GRID[0])


def rotated(features: torch.Tensor) -> torch.Tensor:
    cos, sin = (part.double() for part in rotary())
    turn = torch.complex(cos[:, ::2], sin[:, ::2])
    pairs = torch.view_as_complex(features.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def plain_mass(attn, kwargs: dict, mask: torch.Tensor) -> torch.Tensor:
    """The definition, with the whole matrix; `(batch, heads, video)`."""
    joint = torch.cat([kwargs["encoder_hidden_states"], kwargs["hidden_states"]], dim=1)
    parts = []
    for project, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k)):
        heads = project(joint).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        centred = heads - heads.mean(-1, keepdim=True)
        heads = centred / (heads.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        heads = heads * norm.weight + norm.bias
        if kwargs["image_rotary_emb"] is not None:
            heads = torch.cat([heads[:, :, :TEXT], rotated(heads[:, :, TEXT:])], dim=2)
        parts.append(heads)
    scores = parts[0] @ parts[1].transpose(-1, -2) / parts[0].shape[-1] ** 0.5
    return (scores.softmax(-1)[:, :, TEXT:, :TEXT] * mask[:, None, None, :]).sum(-1)


@torch.no_grad()
def plain_maps(transformer, arguments: dict, mask: torch.Tensor) -> torch.Tensor:
    """`(layers, batch, heads, video)` in float64."""
    maps = []
    hooks = [
        block.attn1.register_forward_pre_hook(
            lambda attn, _, kwargs: maps.append(plain_mass(attn, kwargs, mask)), with_kwargs=True
        )
        for block in transformer.transformer_blocks
    ]
    transformer(**arguments)
    for hook in hooks:
        hook.remove()
    return torch.stack(maps)
