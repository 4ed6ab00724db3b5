"""HunyuanVideo's velocity and clips: what its own pipeline does."""

import pytest
import torch
from diffusers import DDIMScheduler, HunyuanVideoTransformer3DModel

from diffusers_ext.eraser.teacher.trajectory import teacher_trajectory
from diffusers_ext.families.hunyuan_video import HunyuanVideo, HunyuanVideoVelocity
from tests.tiny_hunyuan_video import tiny_hunyuan_video_pipeline

SIZE, SHAPE = (9, 32, 32), (3, 4, 4, 4)
PROMPTS = ["a red seven", "the photo of a blue two"]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_hunyuan_video_pipeline()


@pytest.fixture(scope="module")
def text(pipeline):
    with torch.no_grad():
        return HunyuanVideo().encode_clip_prompts(pipeline, [*PROMPTS, ""])


def first_call(pipeline, **call):
    """Arguments and output of the transformer in the call's first step."""
    seen = {}
    hook = pipeline.transformer.register_forward_hook(
        lambda _, args, kwargs, output: seen.update(kwargs, output=output[0]), with_kwargs=True
    )
    try:
        pipeline(PROMPTS, num_inference_steps=1, output_type="latent", **call)
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_velocity_and_a_run_are_those_of_the_pipeline(pipeline, text, dtype):
    if dtype != torch.float32:
        pipeline = type(pipeline)(**pipeline.components)
        transformer = HunyuanVideoTransformer3DModel.from_config(pipeline.transformer.config)
        pipeline.transformer = transformer.to(dtype).eval()
        pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    size = dict(zip(("num_frames", "height", "width"), SIZE))
    velocity = HunyuanVideo().velocity(pipeline, *SIZE, guidance_scale=4.0)
    seen = first_call(pipeline, latents=latents.transpose(1, 2), guidance_scale=4.0, **size)
    found = velocity(latents, seen["timestep"], text[:2])
    assert torch.equal(found, seen["output"].transpose(1, 2).float())
    assert found.dtype == torch.float32
    call = {"num_inference_steps": 3, "guidance_scale": 4.0}
    given = HunyuanVideo().clip_arguments(text[:2], text[2:].expand(2), latents)
    expected = pipeline(**given, output_type="latent", **size, **call).frames
    *_, last = teacher_trajectory(velocity, pipeline.scheduler, latents, text[:2], text[2:].expand(2), **call)
    expected = HunyuanVideo().clip_latents(expected, SHAPE)
    # The call's latents take the model's precision after a step.
    close = {} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}
    torch.testing.assert_close(last.x_next, expected.float(), **close)
    assert last.negative is None  # the scale is an input of the model
    other = HunyuanVideo().velocity(pipeline, *SIZE, guidance_scale=1.0)
    assert not torch.equal(other(latents, seen["timestep"], text[:2]), found)


def test_prompts_are_encoded_as_by_the_call(pipeline, text):
    call = first_call(pipeline, num_frames=1, height=32, width=32)
    assert torch.equal(text.prompt_embeds[:2], call["encoder_hidden_states"])
    assert torch.equal(text.attention_mask[:2].float(), call["encoder_attention_mask"])
    assert torch.equal(text.pooled_prompt_embeds[:2], call["pooled_projections"])
    assert text.prompt_embeds.shape[1] == HunyuanVideo().text_length(pipeline.transformer.config)
    with pytest.raises(ValueError, match="`negative_prompt` must be None"):
        HunyuanVideo().encode(pipeline, PROMPTS, ["", ""])


def test_sizes_are_those_of_the_model(pipeline):
    family, configs = HunyuanVideo(), (pipeline.transformer.config, pipeline.vae.config)
    assert family.latent_shape(*configs, *SIZE) == SHAPE
    assert family.token_grid(configs[0], SHAPE) == (3, 2, 2)
    assert family.clip_size(*configs) == (129, 720, 1280)
    for size, message in (
        ((8, 32, 32), "`num_frames` must be a multiple of 4 plus 1 .* The nearest is 9"),
        ((9, 40, 32), "`height` must be a positive multiple of 16 .* The nearest is 32"),
        ((9, 32, 0), "`width` must be a positive multiple of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            family.latent_shape(*configs, *size)


def test_bad_input_is_refused(pipeline, text):
    velocity, t = HunyuanVideo().velocity(pipeline, *SIZE), torch.tensor([5.0, 7.0])
    for arguments, error, message in (
        ((torch.randn(2, 4, 3, 4, 4), t, text[:2]), ValueError, r"`x_t` must be \(batch, frames, 4, height, width\)"),
        ((torch.randn(2, *SHAPE), t[:1], text[:2]), ValueError, r"`t` must be \(2,\)"),
        ((torch.randn(2, *SHAPE), t, text), ValueError, r"`prompt_embeds` must be \(2, text, 16\)"),
        ((torch.randn(2, *SHAPE), t, text.prompt_embeds[:2]), TypeError, "a TextConditioning with a mask"),
        ((torch.randn(2, 3, 4, 3, 4), t, text[:2]), ValueError, "`latent_shape` must have frames"),
    ):
        with pytest.raises(error, match=message):
            velocity(*arguments)
    ddim = type(pipeline)(**{**pipeline.components, "scheduler": DDIMScheduler()})
    with pytest.raises(ValueError, match="`pipeline.scheduler` must have the levels of flow matching"):
        HunyuanVideo().velocity(ddim, *SIZE)
    pictures = HunyuanVideoTransformer3DModel.from_config(
        pipeline.transformer.config, image_condition_type="token_replace"
    )
    with pytest.raises(ValueError, match="must be of text-to-video HunyuanVideo"):
        HunyuanVideoVelocity(pictures)
