from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.eraser.config import EraserConfig
from diffusers_ext.eraser.masks import (
    concept_mask,
    mask_to_latents,
    mask_to_tokens,
    normalize_attention,
    velocity_difference,
)
from diffusers_ext.eraser.velocity import CogVideoXVelocity
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
    with pytest.raises(
        ValueError, match=r"`token_mask` must be \(batch, text tokens\) = \(2, 12\)"
    ):
        concept_mask(velocity, **wrong)
    modules = velocity.transformer.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_bad_input_is_refused():
    clip = random(1, 2, 3, 4, 4)
    cases = [
        (
            lambda: normalize_attention(random(1, 5), (1, 2, 3)),
            r"`maps` must be \(batch, 1 x 2 x 3",
        ),
        (lambda: normalize_attention(random(1, 6), (1, 2, 3), 0.0), "`threshold` must be above 0"),
        (lambda: normalize_attention(random(1, 6), (1, 2, 3), 1.5), "`threshold` must be above 0"),
        (lambda: velocity_difference(clip, clip[:, :1], (2, 2, 2)), "`v_anchor` must be"),
        (lambda: velocity_difference(clip, clip, (2, 3, 2)), "`grid` must divide the latents"),
        (lambda: mask_to_latents(random(1, 3, 2, 2), clip.shape), "`grid` must divide the latents"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
