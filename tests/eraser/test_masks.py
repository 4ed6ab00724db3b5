from __future__ import annotations

import pytest
import torch

from diffusers_ext.eraser.concept_masks import mask_to_latents, normalize_attention, velocity_difference, velocity_mask


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


def test_maps_with_nan_do_not_pass_for_maps_without_the_concept():
    maps = torch.tensor([[1.0, torch.nan, 2, 3], [1, 1, 1, 1]])
    mask = normalize_attention(maps, (1, 2, 2))
    assert mask[0].isnan().all()
    assert torch.equal(mask[1], torch.zeros(1, 2, 2))


def test_the_floor_is_a_quantile_of_the_clip():
    maps = torch.tensor([[4.0, 0, 1, 2, 3], [7, 7, 7, 7, 7]])
    mask = normalize_attention(maps, (1, 1, 5), floor=0.5)
    assert torch.equal(mask.flatten(1), torch.tensor([[1.0, 0, 0, 0, 0.5], [0, 0, 0, 0, 0]]))
    assert torch.equal(normalize_attention(maps, (1, 1, 5), floor=0.0)[0, 0, 0], maps[0] / 4)


def test_velocity_masks_multiply_both_differences_and_skip_clips_without_the_concept():
    concept, anchor, empty = (random(2, 2, 3, 2, 3, seed=seed) for seed in range(3))
    grid, named = (2, 2, 3), torch.tensor([[False, True], [False, False]])
    alone = velocity_mask(concept, anchor, named, grid)
    maps = velocity_difference(concept, anchor, grid)
    assert torch.equal(alone[0], normalize_attention(maps, grid, floor=0.5)[0])
    assert torch.equal(alone[1], torch.zeros(grid))
    both = velocity_mask(concept, anchor, named, grid, empty, threshold=0.5)
    maps = (maps * velocity_difference(concept, empty, grid)).sqrt()[0]
    lower, upper = maps.sort().values[5:7]  # of 12: their middle is the median
    middle = (lower + upper) / 2
    expected = ((maps - middle) / (maps.max() - middle) >= 0.5).float()
    assert torch.equal(both[0].flatten(), expected)
    assert 0 < both[0].mean() < 0.5


def test_velocity_difference_is_the_mean_of_each_tokens_patch():
    concept, anchor = random(2, 4, 3, 4, 6), random(2, 4, 3, 4, 6, seed=1)
    found = velocity_difference(concept, anchor, (2, 2, 3))
    expected = torch.zeros(2, 2, 2, 3, dtype=torch.float64)
    for frame, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)):
        patch = (concept - anchor).double()[
            :, 2 * frame : 2 * frame + 2, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2
        ]
        expected[:, frame, row, column] = (patch**2).mean(dim=(1, 2, 3, 4)) ** 0.5
    torch.testing.assert_close(found.double(), expected.flatten(1), rtol=1e-5, atol=0)


def test_masks_for_latents():
    mask = random(2, 2, 2, 3)
    latents = mask_to_latents(mask, (2, 4, 16, 4, 9))
    assert latents.shape == (2, 4, 1, 4, 9)
    assert latents[1, 2, 0, 3, 8] == mask[1, 1, 1, 2]
    assert latents[0, 1, 0, 1, 3] == mask[0, 0, 0, 1]


def test_bad_input_is_refused():
    clip = random(1, 2, 3, 4, 4)
    cases = [
        (lambda: normalize_attention(random(1, 5), (1, 2, 3)), r"`maps` must be \(batch, 1 x 2 x 3"),
        (lambda: normalize_attention(random(1, 6), (1, 2, 3), 0.0), "`threshold` must be above 0"),
        (lambda: normalize_attention(random(1, 6), (1, 2, 3), 1.5), "`threshold` must be above 0"),
        (lambda: normalize_attention(random(1, 6), (1, 2, 3), floor=1.0), "`floor` must be at least"),
        (lambda: velocity_difference(clip, clip[:, :1], (2, 2, 2)), "`v_anchor` must be"),
        (lambda: velocity_difference(clip, clip, (2, 3, 2)), "`grid` must divide the latents"),
        (
            lambda: velocity_mask(*[random(2, 2, 3, 4, 4)] * 2, torch.ones(1, 5) > 0, (2, 2, 2)),
            "`token_mask` must have one row per clip, 2, got 1",
        ),
        (lambda: mask_to_latents(random(1, 3, 2, 2), clip.shape), "`grid` must divide the latents"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
