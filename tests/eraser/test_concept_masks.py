from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.concept_attention import agreement_weights, concept_attention, head_correlations
from diffusers_ext.eraser.concept_masks import (
    concept_head_weights,
    concept_mask,
    mask_to_latents,
    normalize_attention,
    velocity_difference,
    velocity_mask,
)
from diffusers_ext.families.cogvideox import CogVideoXVelocity
from examples.moving_digits.prompts import PROMPT_LENGTH
from tests.tiny_cogvideox import TEXT_WIDTH, tiny_transformer, tiny_video_pipeline


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


GRID = (3, 4, 4)
# Differences of nearly equal velocities, made in batches of other sizes.
CLOSE = {"atol": 1e-3, "rtol": 0.0}


def setting(batch: int = 2) -> tuple[CogVideoXVelocity, dict]:
    pipeline = tiny_video_pipeline()
    velocity = CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16)
    token_mask = torch.zeros(batch, PROMPT_LENGTH, dtype=torch.bool)
    token_mask[0, 2] = True
    return velocity, {
        "x_t": random(batch, 3, 4, 4, 4),
        "t": torch.tensor([300] * batch),
        "prompt_embeds": 3 * random(batch, PROMPT_LENGTH, TEXT_WIDTH, seed=1),
        "token_mask": token_mask,
    }


def test_the_mask_is_the_normalised_attention_and_zero_without_the_concept():
    velocity, given = setting()
    mask = concept_mask(velocity, **given)
    with torch.no_grad(), concept_attention(velocity.transformer, given["token_mask"]) as found:
        velocity(given["x_t"], given["t"], given["prompt_embeds"])
    assert mask.shape == (2, 3, 4, 4)
    assert torch.equal(mask, normalize_attention(found.maps, (3, 4, 4)))
    assert mask[0].amin() == 0
    assert mask[0].amax() == 1
    assert torch.equal(mask[1], torch.zeros(3, 4, 4))
    hard = concept_mask(velocity, **given, threshold=0.4, chunk_size=5)
    assert torch.equal(hard, (mask >= 0.4).float())
    first = concept_mask(velocity, **given, layers=[0])
    assert not torch.equal(first, mask)


def test_the_mask_is_that_of_the_model_without_its_erasers():
    velocity, given = setting()
    expected = concept_mask(velocity, **given)
    transformer = velocity.transformer
    transformer.add_adapter(EraserConfig(r=4, init_weights=False), adapter_name="seven")
    with torch.no_grad():
        before = velocity(given["x_t"], given["t"], given["prompt_embeds"])
        assert torch.equal(concept_mask(velocity, **given), expected)
        assert torch.equal(velocity(given["x_t"], given["t"], given["prompt_embeds"]), before)
        with concept_attention(transformer, given["token_mask"]) as found:
            velocity(given["x_t"], given["t"], given["prompt_embeds"])
    assert not torch.equal(normalize_attention(found.maps, (3, 4, 4)), expected)


def test_masks_and_head_weights_are_made_without_dropout():
    velocity, given = setting()
    for module in velocity.transformer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    given["anchor_embeds"] = 3 * random(2, PROMPT_LENGTH, TEXT_WIDTH, seed=2)
    for make in (concept_mask, concept_head_weights):
        expected = make(velocity, **given)
        velocity.transformer.train()
        assert torch.equal(make(velocity, **given), expected)
        assert all(part.training for part in velocity.transformer.modules())
        velocity.transformer.eval()


def test_patches_of_several_latents_are_one_place_of_the_mask():
    transformer = tiny_transformer(patch_size=2, patch_size_t=2, sample_width=4, sample_height=4)
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), (2, 2)), grid_size=(2, 2), temporal_size=2)
    velocity = CogVideoXVelocity(transformer, image_rotary_emb=rotary)
    given = setting()[1] | {"x_t": random(2, 4, 4, 4, 4)}
    mask = concept_mask(velocity, **given)
    assert mask.shape == (2, 2, 2, 2)
    assert mask_to_latents(mask, given["x_t"].shape).shape == (2, 4, 1, 4, 4)


def test_the_transformer_is_left_without_hooks_when_the_forward_fails():
    velocity, given = setting()
    wrong = given | {"token_mask": given["token_mask"][:, :-1]}
    with pytest.raises(ValueError, match=r"`token_mask` must be \(batch, text tokens\) = \(2, 12\)"):
        concept_mask(velocity, **wrong)
    modules = velocity.transformer.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(3 * random(2, PROMPT_LENGTH, TEXT_WIDTH, seed=seed) for seed in (2, 3))


@torch.no_grad()
def velocities(velocity: CogVideoXVelocity, given: dict) -> list[torch.Tensor]:
    every = (given["prompt_embeds"], *texts())
    return [velocity(given["x_t"], given["t"], embeds) for embeds in every]


def test_with_an_anchor_the_mask_is_that_of_the_velocities():
    velocity, given = setting()
    anchor, empty = texts()
    v_concept, v_anchor, v_empty = velocities(velocity, given)
    tokens = given["token_mask"]
    mask = concept_mask(velocity, **given, anchor_embeds=anchor)
    torch.testing.assert_close(mask, velocity_mask(v_concept, v_anchor, tokens, GRID), **CLOSE)
    assert not mask[1].any()
    both = concept_mask(velocity, **given, anchor_embeds=anchor, empty_embeds=empty)
    torch.testing.assert_close(both, velocity_mask(v_concept, v_anchor, tokens, GRID, v_empty), **CLOSE)
    assert not torch.allclose(both, mask, atol=0.01)


def test_weighted_heads_and_velocities_are_multiplied():
    velocity, given = setting()
    anchor = texts()[0]
    weights = torch.tensor([[0.0, 0.75], [0.25, 0.0]])
    tokens = given["token_mask"]
    with torch.no_grad(), concept_attention(velocity.transformer, tokens, head_weights=weights) as found:
        velocity(given["x_t"], given["t"], given["prompt_embeds"])
    attended = normalize_attention(found.maps, GRID, floor=0.5)
    mask = concept_mask(velocity, **given, head_weights=weights)
    torch.testing.assert_close(mask, attended, **CLOSE)
    both = concept_mask(velocity, **given, head_weights=weights, anchor_embeds=anchor)
    changed = velocity_mask(*velocities(velocity, given)[:2], tokens, GRID)
    torch.testing.assert_close(both, (attended * changed).sqrt(), **CLOSE)
    hard = concept_mask(velocity, **given, head_weights=weights, anchor_embeds=anchor, threshold=0.3)
    assert torch.equal(hard, (both >= 0.3).float())


def test_head_weights_are_the_agreement_with_the_velocities_of_the_clips_that_name_the_concept():
    velocity, given = setting()
    velocity.transformer.add_adapter(EraserConfig(r=4, init_weights=False), adapter_name="seven")
    velocity.transformer.disable_adapters()
    tokens, anchor = given["token_mask"], texts()[0]
    with torch.no_grad(), concept_attention(velocity.transformer, tokens, keep_heads=True) as found:
        velocity(given["x_t"], given["t"], given["prompt_embeds"])
    difference = velocity_difference(*velocities(velocity, given)[:2], GRID)
    expected = agreement_weights(head_correlations(found.head_maps[:1], difference[:1]))
    velocity.transformer.enable_adapters()
    weights = concept_head_weights(velocity, anchor_embeds=anchor, **given)
    torch.testing.assert_close(weights, expected, **CLOSE)
    last = concept_head_weights(velocity, anchor_embeds=anchor, **given, layers=[1])
    torch.testing.assert_close(last, expected[1:] / expected[1:].sum(), **CLOSE)


def test_head_weights_do_not_depend_on_the_batch():
    velocity, given = setting(3)
    given["token_mask"][2, 3] = True
    anchor = 3 * random(3, PROMPT_LENGTH, TEXT_WIDTH, seed=2)
    one, all_at_once = (
        concept_head_weights(velocity, anchor_embeds=anchor, **given, batch_size=size) for size in (1, 3)
    )
    torch.testing.assert_close(one, all_at_once, **CLOSE)


def test_head_weights_need_a_prompt_with_the_concept_and_an_anchor_without_it():
    velocity, given = setting()
    with pytest.raises(ValueError, match="`correlations` must be above 0 for some head"):
        concept_head_weights(velocity, anchor_embeds=given["prompt_embeds"], **given)
    given["token_mask"][:] = False
    with pytest.raises(ValueError, match="`token_mask` must mark the concept in some prompt"):
        concept_head_weights(velocity, anchor_embeds=texts()[0], **given)


def test_the_empty_prompt_needs_an_anchor():
    velocity, given = setting()
    with pytest.raises(ValueError, match="`empty_embeds` must come with `anchor_embeds`"):
        concept_mask(velocity, **given, empty_embeds=texts()[1])
