"""Tests of the sizes of clips, latents and token grids, against the pipelines themselves."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.families.cogvideox import CogVideoX
from tests.tiny_cogvideox import tiny_transformer, tiny_vae, tiny_video_pipeline

ABSOLUTE = {"use_rotary_positional_embeddings": False}
PATCHES_IN_TIME = {"patch_size": 2, "patch_size_t": 2, "sample_height": 8, "sample_width": 8}


def latent_shape(transformer, vae, *size):
    return CogVideoX().latent_shape(transformer.config, vae.config, *size)


def token_grid(transformer, shape):
    return CogVideoX().token_grid(transformer.config, shape)


@pytest.mark.parametrize(
    ("overrides", "frames", "expected"),
    [
        ({}, 9, (3, 4, 4, 4)),
        ({}, 17, (5, 4, 4, 4)),
        ({}, 1, (1, 4, 4, 4)),
        (ABSOLUTE, 9, (3, 4, 4, 4)),
        (PATCHES_IN_TIME, 9, (4, 4, 4, 4)),
        (PATCHES_IN_TIME, 17, (6, 4, 4, 4)),
    ],
)
def test_latents_have_the_shape_that_the_pipeline_denoises(overrides, frames, expected):
    pipeline = tiny_video_pipeline(**overrides)
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["hidden_states"].shape)), with_kwargs=True
    )
    pipeline(
        "a red seven moving right", num_frames=frames, height=16, width=16, guidance_scale=1.0,
        num_inference_steps=1, max_sequence_length=12, output_type="latent",
    )  # fmt: skip
    hook.remove()
    found = latent_shape(pipeline.transformer, pipeline.vae, frames, 16, 16)
    assert found == expected == seen[0][1:]


@pytest.mark.parametrize("overrides", [{}, PATCHES_IN_TIME])
def test_the_grid_has_one_place_per_video_token(overrides):
    transformer = tiny_transformer(**overrides)
    shape = latent_shape(transformer, tiny_vae(), 9, 16, 24)
    grid = token_grid(transformer, shape)
    text = torch.zeros(1, 12, 16)
    embedded = transformer.patch_embed(text, torch.zeros(1, *shape))
    assert embedded.shape[1] - 12 == grid.frames * grid.rows * grid.columns
    assert token_grid(transformer, (7, *shape)) == grid
    assert grid.columns > grid.rows


@pytest.mark.parametrize(("frames", "nearest"), [(8, 9), (12, 9), (15, 17), (0, 1), (-3, 1)])
def test_frames_that_the_decoder_would_change_are_refused(frames, nearest):
    message = f"`num_frames` must be a multiple of 8 plus 1.*got {frames}. The nearest is {nearest}"
    with pytest.raises(ValueError, match=message):
        latent_shape(tiny_transformer(), tiny_vae(), frames, 16, 16)


@torch.no_grad()
def test_the_decoder_returns_other_numbers_of_frames_than_those_accepted():
    vae = tiny_vae()
    for frames, decoded in ((9, 9), (13, 16), (17, 17)):
        latents = vae.encode(torch.zeros(1, 3, frames, 16, 16)).latent_dist.mode()
        assert vae.decode(latents).sample.shape[2] == decoded


def test_sizes_that_do_not_divide_are_refused_with_the_nearest():
    transformer = tiny_transformer(patch_size=4)
    with pytest.raises(ValueError, match="`height` must be .* multiple of 16.*24. The nearest is"):
        latent_shape(transformer, tiny_vae(), 9, 24, 16)
    with pytest.raises(ValueError, match="`width` must be .* multiple of 8.*got 18.*nearest is 16"):
        latent_shape(tiny_transformer(), tiny_vae(), 9, 16, 18)


def test_sizes_without_positions_are_refused():
    learned = tiny_transformer(use_learned_positional_embeddings=True)
    assert latent_shape(learned, tiny_vae(), 17, 16, 16) == (5, 4, 4, 4)
    with pytest.raises(ValueError, match="must be 16 and 16 .* learned positions, got 24 and 16"):
        latent_shape(learned, tiny_vae(), 9, 24, 16)
    with pytest.raises(ValueError, match="must be at most 32 and 32 .*, got 16 and 48"):
        latent_shape(tiny_transformer(**PATCHES_IN_TIME), tiny_vae(), 9, 16, 48)


def test_a_grid_needs_latents_that_patches_tile():
    transformer = tiny_transformer(**PATCHES_IN_TIME)
    with pytest.raises(ValueError, match="frames divisible by 2 .* got \\(3, 4, 4, 4\\)"):
        token_grid(transformer, (3, 4, 4, 4))
    with pytest.raises(ValueError, match="`latent_shape` must be \\(frames, channels, height"):
        token_grid(transformer, (4, 4, 4))
