"""Tests of one call of the transformer, against what the pipelines themselves pass."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline
from peft import get_peft_model

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.model import register_eraser
from diffusers_ext.eraser.teacher.collect import teacher_velocities
from diffusers_ext.families.cogvideox import CogVideoXVelocity
from tests.tiny_cogvideox import tiny_transformer, tiny_video_pipeline

ABSOLUTE = {"use_rotary_positional_embeddings": False}
PATCHES_IN_TIME = {"patch_size": 2, "patch_size_t": 2, "sample_height": 8, "sample_width": 8}
IMAGE_TO_VIDEO = {**PATCHES_IN_TIME, "in_channels": 8, "ofs_embed_dim": 8}


def first_call(pipeline, **call):
    """Arguments and output of the transformer in the pipeline's first step, without guidance."""
    seen = {}

    def keep(_, args, kwargs, output):
        seen.update(kwargs, output=output[0])

    hook = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        pipeline(
            prompt="a red seven moving right", num_frames=9, height=16, width=16,
            num_inference_steps=1, guidance_scale=1.0, max_sequence_length=12,
            generator=torch.Generator().manual_seed(0), output_type="latent", **call,
        )  # fmt: skip
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("overrides", [{}, ABSOLUTE, PATCHES_IN_TIME])
@torch.no_grad()
def test_it_predicts_what_the_pipeline_predicts(overrides):
    pipeline = tiny_video_pipeline(**overrides)
    seen = first_call(pipeline)
    velocity = CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16)
    found = velocity(seen["hidden_states"], seen["timestep"], seen["encoder_hidden_states"])
    assert torch.equal(found, seen["output"])
    assert (velocity.image_rotary_emb is None) == (overrides == ABSOLUTE)


@torch.no_grad()
def test_it_predicts_what_the_image_to_video_pipeline_predicts():
    parts = tiny_video_pipeline(**IMAGE_TO_VIDEO).components
    pipeline = CogVideoXImageToVideoPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    seen = first_call(pipeline, image=torch.rand(1, 3, 16, 16))
    x_t, image_latents = seen["hidden_states"].chunk(2, dim=2)
    assert x_t.shape == (1, 4, 4, 4, 4)
    velocity = CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16, image_latents=image_latents)
    assert velocity.ofs == 2.0
    found = velocity(x_t, seen["timestep"], seen["encoder_hidden_states"])
    assert torch.equal(found, seen["output"])
    two = velocity(*(torch.cat([seen[k][:, :, :4] if k == "hidden_states" else seen[k]] * 2)
                     for k in ("hidden_states", "timestep", "encoder_hidden_states")))  # fmt: skip
    torch.testing.assert_close(two[1:], found)
    with pytest.raises(ValueError, match="`image_latents` must be given to this model"):
        CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16)


@torch.no_grad()
def test_low_precision_models_take_float32_and_give_float32():
    pipeline = tiny_video_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    velocity = CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16)
    found = velocity(torch.randn(2, 3, 4, 4, 4), torch.tensor([1, 900]), torch.randn(2, 12, 16))
    assert found.dtype == torch.float32
    assert found.isfinite().all()


def test_gradients_reach_the_prompt_and_the_latents():
    velocity = CogVideoXVelocity.from_pipeline(tiny_video_pipeline(), 9, 16, 16)
    x_t = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    prompt = torch.randn(1, 12, 16, requires_grad=True)
    velocity(x_t, torch.tensor([500]), prompt).square().sum().backward()
    assert x_t.grad.abs().sum() > 0
    assert prompt.grad.abs().sum() > 0


def test_a_model_without_what_it_needs_is_refused():
    with pytest.raises(ValueError, match="`image_rotary_emb` must be given to this model"):
        CogVideoXVelocity(tiny_transformer())
    rotary = (torch.zeros(48, 16),) * 2
    with pytest.raises(ValueError, match="`image_rotary_emb` must be None"):
        CogVideoXVelocity(tiny_transformer(**ABSOLUTE), image_rotary_emb=rotary)
    with pytest.raises(ValueError, match="`ofs` must be None"):
        CogVideoXVelocity(tiny_transformer(), image_rotary_emb=rotary, ofs=2.0)
    with pytest.raises(ValueError, match="`ofs` must be given"):
        CogVideoXVelocity(tiny_transformer(**IMAGE_TO_VIDEO), image_rotary_emb=rotary)


def test_a_scheduler_of_another_prediction_is_refused():
    pipeline = tiny_video_pipeline()
    pipeline.scheduler = CogVideoXDDIMScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match="'v_prediction', got 'epsilon'"):
        CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16)


@pytest.mark.parametrize(
    ("x_t", "t", "prompt", "message"),
    [
        ((2, 4, 3, 4, 4), (2,), (2, 12, 16), "`x_t` must be \\(batch, frames, 4"),
        ((3, 4, 4, 4), (3,), (3, 12, 16), "`x_t` must be"),
        ((2, 3, 4, 4, 4), (1,), (2, 12, 16), "`t` must be \\(2,\\)"),
        ((2, 3, 4, 4, 4), (2,), (1, 12, 16), "`prompt_embeds` must be \\(2, text, 16\\)"),
        ((2, 5, 4, 4, 4), (2,), (2, 12, 16), "must have 48 video tokens .* got 80"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(x_t, t, prompt, message):
    velocity = CogVideoXVelocity.from_pipeline(tiny_video_pipeline(), 9, 16, 16)
    with pytest.raises(ValueError, match=message):
        velocity(torch.zeros(x_t), torch.zeros(t, dtype=torch.long), torch.zeros(prompt))


@torch.no_grad()
def test_a_peft_model_is_called_as_it_is():
    register_eraser()
    pipeline = tiny_video_pipeline()
    bare = CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16)
    rows = torch.randn(2, 3, 4, 4, 4), torch.tensor([1, 900]), torch.randn(2, 12, 16)
    before = bare(*rows)
    pipeline.transformer = get_peft_model(pipeline.transformer, EraserConfig(r=4, init_weights=False))
    velocity = CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16)
    erased = velocity(*rows)
    assert not torch.equal(erased, before)
    (found,) = teacher_velocities(velocity, velocity, [rows])
    assert torch.equal(found, before)
    assert torch.equal(velocity(*rows), erased)
