from __future__ import annotations

import pytest
import torch

from diffusers_ext.eraser.masks import (
    concept_mask,
    mask_to_latents,
    mask_to_tokens,
    normalize_attention,
    velocity_difference,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_normalisation_runs_over_the_whole_clip():
    maps = torch.tensor([[1.0, 2, 1, 1.5, 5, 3], [0, 0, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2]])
    mask = normalize_attention(maps, (2, 1, 3))
    expected = torch.tensor([[[0, 0.25, 0]], [[0.125, 1, 0.5]]])
    assert torch.equal(mask[0], expected)
    assert torch.equal(mask[1:], torch.zeros(2, 2, 1, 3))
    hard = normalize_attention(maps, (2, 1, 3), threshold=0.5)
    assert torch.equal(hard[0], torch.tensor([[[0.0, 0, 0]], [[0, 1, 1]]]))
    assert torch.equal(hard[1:], torch.zeros(2, 2, 1, 3))


def test_velocity_difference_is_the_mean_of_each_tokens_patch():
    concept, anchor = random(2, 4, 3, 4, 6), random(2, 4, 3, 4, 6, seed=1)
    found = velocity_difference(concept, anchor, (2, 2, 3))
    expected = torch.zeros(2, 2, 2, 3, dtype=torch.float64)
    for frame, row, column in torch.cartesian_prod(
        torch.arange(2), torch.arange(2), torch.arange(3)
    ):
        patch = (concept - anchor).double()[
            :, 2 * frame : 2 * frame + 2, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2
        ]
        expected[:, frame, row, column] = (patch**2).mean(dim=(1, 2, 3, 4)) ** 0.5
    torch.testing.assert_close(found.double(), expected.flatten(1), rtol=1e-5, atol=0)


def test_masks_for_tokens_and_latents():
    mask = random(2, 2, 2, 3)
    tokens = mask_to_tokens(mask)
    assert tokens.shape == (2, 12, 1)
    assert tokens[1, 1 * 6 + 1 * 3 + 2, 0] == mask[1, 1, 1, 2]
    latents = mask_to_latents(mask, (2, 4, 16, 4, 9))
    assert latents.shape == (2, 4, 1, 4, 9)
    assert latents[1, 2, 0, 3, 8] == mask[1, 1, 1, 2]
    assert latents[0, 1, 0, 1, 3] == mask[0, 0, 0, 1]
