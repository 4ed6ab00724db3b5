"""HunyuanVideo 1.5's velocity, text and guidance: what its own pipeline does."""

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.guiders import ClassifierFreeGuidance, TangentialClassifierFreeGuidance

from diffusers_ext.eraser.teacher.trajectory import teacher_trajectory
from diffusers_ext.families import find_family
from diffusers_ext.families.hunyuan_video15 import HunyuanVideo15
from tests.tiny_hunyuan_video import few_tokens, tiny_hunyuan_video15_pipeline

SIZE, SHAPE = (5, 32, 32), (2, 4, 2, 2)
PROMPTS = ["a red seven", 'the photo of a "blue" two']
CALL = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipeline():
    with few_tokens():
        return tiny_hunyuan_video15_pipeline()


@pytest.fixture(scope="module")
def text(pipeline):
    with torch.no_grad():
        return HunyuanVideo15().encode_clip_prompts(pipeline, [*PROMPTS, ""])


def calls_of(pipeline, prompt=None, **call):
    """Arguments and outputs of the transformer in a call of the pipeline, and what it returns."""
    seen = []
    hook = pipeline.transformer.register_forward_hook(
        lambda _, args, kwargs, output: seen.append({**kwargs, "output": output[0]}), with_kwargs=True
    )
    try:
        return seen, pipeline(prompt, **CALL, **call).frames
    finally:
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_velocity_and_a_run_are_those_of_the_pipeline(pipeline, text, dtype):
    family, transformer = find_family(pipeline), pipeline.transformer
    pipeline.transformer = HunyuanVideo15Transformer3DModel.from_config(transformer.config).to(dtype).eval()
    pipeline.transformer.load_state_dict(transformer.state_dict())
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    velocity = family.velocity(pipeline, *SIZE)
    try:
        with family.guided_call(pipeline, 4.0) as guidance:
            seen, expected = calls_of(pipeline, list(PROMPTS), latents=latents.transpose(1, 2), **guidance)
        assert pipeline.guider.guidance_scale == 6.0
        first = seen[0]["timestep"]
        for call, rows in zip(seen, (text[:2], text[[2, 2]])):
            assert torch.equal(velocity(latents, first, rows), call["output"].transpose(1, 2).float())
        embeds = text.to("cpu", dtype)
        run = {"num_inference_steps": 3, "guidance_scale": 4.0}
        *_, last = teacher_trajectory(velocity, pipeline.scheduler, latents, embeds[:2], embeds[[2, 2]], **run)
        # The call guides in the model's precision.
        close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
        found = family.clip_latents(expected, SHAPE)
        torch.testing.assert_close(last.x_next, found, **close)
        with family.guided_call(pipeline, 4.0):
            _, encoded = calls_of(pipeline, **family.clip_arguments(embeds[:2], embeds[[2, 2]], latents))
        torch.testing.assert_close(encoded, expected)
    finally:
        pipeline.transformer = transformer


@torch.no_grad()
def test_the_guider_s_scale_is_that_of_runs(pipeline, text):
    family, latents = find_family(pipeline), torch.randn(2, *SHAPE)
    velocity = family.velocity(pipeline, *SIZE)
    for scale, times in ((1.0, 3), (0.5, 6)):
        with family.guided_call(pipeline, scale):
            seen, expected = calls_of(pipeline, list(PROMPTS), latents=latents.transpose(1, 2))
        assert len(seen) == times
        run = {"num_inference_steps": 3, "guidance_scale": scale}
        *_, last = teacher_trajectory(velocity, pipeline.scheduler, latents, text[:2], text[[2, 2]], **run)
        torch.testing.assert_close(last.x_next, family.clip_latents(expected, SHAPE), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_prompts_are_encoded_as_by_the_call(pipeline, text):
    (call, empty, *_), _ = calls_of(pipeline, list(PROMPTS))
    for name, found in {
        "encoder_hidden_states": text.prompt_embeds,
        "encoder_attention_mask": text.attention_mask.float(),
        "encoder_hidden_states_2": text.prompt_embeds_2,
        "encoder_attention_mask_2": text.attention_mask_2.float(),
    }.items():
        assert torch.equal(found[:2], call[name])
        assert torch.equal(found[[2, 2]], empty[name])
    assert text.attention_mask_2.sum(1).tolist()[::2] == [0, 0]  # nothing in quotes
    family = find_family(pipeline)
    assert text.prompt_embeds.shape[1] == family.prompt_length(pipeline)
    assert family.text_length(pipeline.transformer.config) == 1000
    both = family.encode(pipeline, list(PROMPTS), None)
    assert torch.equal(both.negative_prompt_embeds[0], text.prompt_embeds[2])


def test_sizes_are_those_of_the_model(pipeline):
    family, configs = HunyuanVideo15(), (pipeline.transformer.config, pipeline.vae.config)
    assert family.latent_shape(*configs, *SIZE) == SHAPE
    assert family.clip_size(*configs) == (121, 48, 80)
    with pytest.raises(ValueError, match="`height` must be a positive multiple of 16 .* The nearest is 48"):
        family.latent_shape(*configs, 5, 44, 32)


def test_bad_input_is_refused(pipeline, text):
    family, t = HunyuanVideo15(), torch.tensor([5.0, 7.0])
    velocity, x_t = family.velocity(pipeline, *SIZE), torch.randn(2, *SHAPE)
    with pytest.raises(ValueError, match=r"`x_t` must be \(batch, frames, 4, height, width\)"):
        velocity(torch.randn(2, 2, 9, 2, 2), t, text[:2])
    with pytest.raises(TypeError, match="must be a TextConditioning with two texts and their masks"):
        velocity(x_t, t, text.prompt_embeds[:2])
    for guider in (ClassifierFreeGuidance(guidance_rescale=0.5), ClassifierFreeGuidance(stop=0.5), "off", "other"):
        if guider == "off":
            guider = ClassifierFreeGuidance()
            guider.disable()
        elif guider == "other":
            guider = TangentialClassifierFreeGuidance()
        others = type(pipeline)(**{**pipeline.components, "guider": guider})
        with pytest.raises(ValueError, match="`pipeline.guider` must be an enabled ClassifierFreeGuidance of all"):
            family.velocity(others, *SIZE)
        with pytest.raises(ValueError, match="`pipeline.guider` must be"), family.guided_call(others, 3.0):
            pass
        with pytest.raises(ValueError, match="`pipeline.guider` must be"):
            family.encode_clip_prompts(others, PROMPTS)
