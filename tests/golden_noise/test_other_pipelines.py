"""The ways of docs/golden_noise.md to golden noise in pipelines that take no `noise_model`."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)

from diffusers_ext.golden_noise.redenoise import encode_prompts
from tests.golden_noise.golden_pipelines import PROMPTS, draw, golden_pipeline

# Of Euler's scheduler under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PROMPT = PROMPTS[0]
SIDE = 32  # pixels


@pytest.fixture
def golden():
    """Pipeline, a seed's noise, and what the network makes of it."""
    pipeline = golden_pipeline("sd")
    text = encode_prompts(pipeline, [PROMPT])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipeline, noise, pipeline.noise_model.refine(noise, text.prompt_embeds)


def call(pipeline, **arguments) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, num_inference_steps=2, output_type="pt", **arguments).images


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_controlnet_draws_from_golden_latents(golden, scheduler):
    pipeline, noise, refined = golden
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    controlnet = ControlNetModel.from_unet(
        pipeline.unet,
        conditioning_embedding_out_channels=(16, 32, 96),  # for a VAE of factor 4
    )
    other = StableDiffusionControlNetPipeline.from_pipe(pipeline, controlnet=controlnet)
    condition = torch.rand(1, 3, SIDE, SIDE)
    drawn = call(other, image=condition, latents=refined)
    # A new ControlNet adds nothing, so it is the picture of the golden pipeline.
    expected = draw(pipeline, "sd", latents=noise)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(call(other, image=condition, latents=noise), expected, atol=1e-2)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_inpainting_at_full_strength_draws_from_golden_latents(golden, scheduler):
    pipeline, noise, refined = golden
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    other = StableDiffusionInpaintPipeline.from_pipe(pipeline)
    arguments = {
        "image": torch.zeros(1, 3, SIDE, SIDE), "mask_image": torch.ones(1, 1, SIDE, SIDE),
        "height": SIDE, "width": SIDE, "strength": 1.0,
    }  # fmt: skip
    drawn = call(other, latents=refined, **arguments)
    # Everything is masked, so it is the picture of the golden pipeline.
    torch.testing.assert_close(drawn, draw(pipeline, "sd", latents=noise), rtol=0, atol=1e-4)
    assert not torch.allclose(call(other, latents=noise, **arguments), drawn, atol=1e-2)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_image_to_image_takes_the_change_with_the_image(golden, scheduler):
    pipeline, noise, refined = golden
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))  # latents
    steps, strength = 4, 0.5
    other.scheduler.set_timesteps(steps)
    start = other.scheduler.timesteps[steps - int(steps * strength)].reshape(1)
    zeros = torch.zeros_like(image)
    signal = other.scheduler.add_noise(torch.ones_like(image), zeros, start)
    shift = other.scheduler.add_noise(zeros, refined - noise, start) / signal
    expected = other.scheduler.add_noise(image, refined, start)
    seen, add_noise = [], other.scheduler.add_noise

    def watched(*arguments):
        seen.append(add_noise(*arguments))
        return seen[-1]

    other.scheduler.add_noise = watched
    other.set_progress_bar_config(disable=True)
    other(
        PROMPT, image=image + shift, strength=strength, num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-4)
