"""The measurement of where learned embeddings bring a concept back, on a tiny model."""

from __future__ import annotations

import torch

from benchmarks.where_concepts_return import by_depth, by_time, distance, hidden_from
from diffusers_ext.eraser.attack import insert_embeddings
from diffusers_ext.families.cogvideox import CogVideoXVelocity
from tests.eraser.erased_models import erased_pipeline, random_rows


def test_embeddings_hidden_from_all_layers_are_padding_and_from_none_are_themselves():
    pipeline = erased_pipeline("rotary", torch.float32)
    velocity = CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16)
    x_t, t, text = random_rows(6, 3, dtype=torch.float32)
    states = (x_t, torch.linspace(10, 990, 6).long(), text, torch.zeros_like(x_t))
    embeddings = 3 * torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    blocks = velocity.model.transformer_blocks
    with hidden_from(blocks, range(len(blocks)), 4):
        hidden = distance(velocity, states, embeddings)
    # A block changes its own padding, which the hidden tokens then read as it was before it.
    padding = insert_embeddings(text, torch.zeros(4, 16), velocity.config)
    padding[:, -4:] = text[:, -1:]
    with torch.no_grad():
        expected = velocity(x_t, states[1], padding).square().mean().item()
    assert abs(hidden / expected - 1) < 1e-4
    rows = dict(by_depth(velocity, states, embeddings))
    assert float(rows["all"]) == round(distance(velocity, states, embeddings), 4)
    assert float(rows["none"]) == round(hidden, 4) != float(rows["all"])
    assert len(by_time(velocity, states, embeddings)) == 5
