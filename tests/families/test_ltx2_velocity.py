"""LTX-2's velocity of the video, with the sound beside it: what its own pipeline does."""

import pytest
import torch
from diffusers import DDIMScheduler, LTX2VideoTransformer3DModel

from diffusers_ext.eraser.teacher.trajectory import teacher_trajectory
from diffusers_ext.families.ltx2 import LTX2, LTX2Velocity
from tests.tiny_current_pipelines import tiny_ltx2_pipeline

SIZE, SHAPE = (3, 32, 32), (2, 4, 16, 16)
PROMPTS = ["a red seven", "a photo of the blue two"]


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_ltx2_pipeline()
    pipeline.tokenizer.model_max_length = 16
    for vae in (pipeline.vae, pipeline.audio_vae):  # not those of a new one, zeros and ones
        torch.nn.init.normal_(vae.latents_mean)
        torch.nn.init.uniform_(vae.latents_std, 0.5, 2.0)
    return pipeline


@pytest.fixture(scope="module")
def text(pipeline):
    with torch.no_grad():
        return LTX2().encode_clip_prompts(pipeline, [*PROMPTS, ""])


def drawn(pipeline, state, **call):
    """What a call makes of the latents of a state, and what its transformer was asked and answered first."""
    velocity, seen = LTX2().velocity(pipeline, *SIZE), []
    video = pipeline._pack_latents(velocity.without_image(state).transpose(1, 2))
    sound = velocity.sound_of(state) * pipeline.audio_vae.latents_std + pipeline.audio_vae.latents_mean
    hook = pipeline.transformer.register_forward_hook(
        lambda _, __, kwargs, output: seen.append({**kwargs, "output": output}), with_kwargs=True
    )
    size = dict(zip(("num_frames", "height", "width"), SIZE))
    try:
        found = pipeline(latents=video, audio_latents=sound, output_type="latent", **size, **call)
    finally:
        hook.remove()
    video = pipeline._normalize_latents(
        found.frames, pipeline.vae.latents_mean, pipeline.vae.latents_std, pipeline.vae.config.scaling_factor
    )
    packed, stats = pipeline._pack_audio_latents(found.audio), pipeline.audio_vae
    sound = pipeline._normalize_audio_latents(packed, stats.latents_mean, stats.latents_std)
    return velocity.joined(video.transpose(1, 2), sound), seen[0]


@pytest.mark.parametrize("scale", [4.0, 1.0])
@torch.no_grad()
def test_velocities_and_runs_of_video_and_sound_are_those_of_the_pipeline(pipeline, text, scale):
    velocity, call = LTX2().velocity(pipeline, *SIZE), {"num_inference_steps": 3}
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(2, *velocity.state_shape(SHAPE), generator=generator)
    *_, last = teacher_trajectory(
        velocity, pipeline.scheduler, state, text[:2], text[[2, 2]], guidance_scale=scale, **call
    )
    assert last.velocity.shape == (2, *SHAPE)
    assert last.x_t.shape == state.shape
    found = velocity.joined(velocity.without_image(last.x_next), velocity.sound_of(last.x_next))
    given = ({"prompt": PROMPTS, "max_sequence_length": 16}, LTX2().clip_arguments(text[:2], text[[2, 2]]))
    for prompts in given:
        with LTX2().guided_call(pipeline, scale) as guidance:
            expected, first = drawn(pipeline, state, **call, **guidance, **prompts)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        rows = text[[2, 2, 0, 1]] if scale != 1 else text[:2]
        states = torch.cat([state] * (len(rows) // 2))
        video, sound = first["output"]
        of_state = velocity.joined(LTX2().clip_latents(video, SHAPE), sound)
        asked = (states, first["timestep"], rows)
        torch.testing.assert_close(velocity.of_state(*asked), of_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(velocity(*asked), velocity.without_image(of_state), atol=1e-5, rtol=1e-5)
    assert "forward" not in vars(pipeline.connectors)


@torch.no_grad()
def test_calls_that_overlap_hand_on_until_the_last_has_ended(pipeline, text):
    made = text[:2].tensors()
    joined = torch.cat([made["prompt_embeds"], made["prompt_embeds_2"]], dim=-1)
    first, second = (LTX2().guided_call(pipeline, scale) for scale in (1.0, 4.0))
    first.__enter__()
    assert second.__enter__()["guidance_scale"] == 4.0
    first.__exit__(None, None, None)
    read, heard, mask = pipeline.connectors(joined, made["attention_mask"])
    assert torch.equal(read, made["prompt_embeds"])
    assert torch.equal(heard, made["prompt_embeds_2"])
    second.__exit__(None, None, None)
    assert "forward" not in vars(pipeline.connectors)


@torch.no_grad()
def test_the_sound_is_read(pipeline, text):
    velocity = LTX2().velocity(pipeline, *SIZE)
    assert velocity.num_sounds == 3  # of 3 frames at 24 a second
    state, t = torch.randn(2, *velocity.state_shape(SHAPE)), torch.tensor([900.0, 400.0])
    video, sound = velocity.without_image(state), velocity.sound_of(state)
    other = velocity.joined(video, sound + 1)
    assert torch.equal(velocity.sound_of(other), sound + 1)
    assert torch.equal(velocity.without_image(other), video)
    assert not torch.equal(velocity(other, t, text[:2]), velocity(state, t, text[:2]))
    assert torch.equal(velocity(velocity.joined(video, sound), t, text[:2]), velocity(state, t, text[:2]))


@torch.no_grad()
def test_half_precision(pipeline, text):
    velocity = LTX2().velocity(pipeline, *SIZE)
    state, t = torch.randn(2, *velocity.state_shape(SHAPE)), torch.tensor([900.0, 400.0])
    transformer = LTX2VideoTransformer3DModel.from_config(pipeline.transformer.config)
    transformer.load_state_dict(pipeline.transformer.state_dict())
    half = LTX2Velocity(transformer.to(torch.bfloat16).eval(), 3)(state, t, text[:2])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, velocity(state, t, text[:2]), atol=0.1, rtol=0.1)


def test_sizes_are_those_of_the_model(pipeline):
    family, configs = LTX2(), (pipeline.transformer.config, pipeline.vae.config)
    assert family.latent_shape(*configs, *SIZE) == SHAPE
    assert family.clip_size(*configs) == (121, 512, 768)
    for size, message in (
        ((4, 32, 32), "`num_frames` must be a multiple of 2 plus 1"),
        ((3, 48, 32), "`height` must be a positive multiple of 32 .* The nearest is 64"),
    ):
        with pytest.raises(ValueError, match=message):
            family.latent_shape(*configs, *size)
    with pytest.raises(ValueError, match="`transformer` must have a token for every latent pixel, got patches of"):
        family.token_grid({"patch_size": 2, "patch_size_t": 1}, SHAPE)


def test_bad_input_is_refused(pipeline, text):
    velocity, t = LTX2().velocity(pipeline, *SIZE), torch.tensor([900.0, 400.0])
    state = torch.randn(2, *velocity.state_shape(SHAPE))
    for arguments, error, message in (
        (
            (state[:, :, :4], t, text[:2]),
            ValueError,
            r"`x_t` must be \(batch, frames, 4 of the video and those of the",
        ),
        ((state, t[:1], text[:2]), ValueError, r"`t` must be \(2,\)"),
        ((state, t, text), ValueError, "`prompt_embeds` must be 2 texts, one a clip, got 3"),
        ((state, t, text.prompt_embeds[:2]), TypeError, "a TextConditioning with a mask and two texts"),
    ):
        with pytest.raises(error, match=message):
            velocity(*arguments)
    ddim = type(pipeline)(**{**pipeline.components, "scheduler": DDIMScheduler()})
    with pytest.raises(ValueError, match="`pipeline.scheduler` must have the levels of flow matching"):
        LTX2().velocity(ddim, *SIZE)
