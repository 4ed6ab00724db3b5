from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_ext.families.velocity import latent_scale
from diffusers_ext.training.nullspace.data import draw_images, sampling_arguments
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_pipelines import sdxl_pipeline

RUN = {"num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(params=[random_digits_pipeline, sdxl_pipeline], ids=["sd", "sdxl"])
def pipeline(request):
    return request.param()


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.float32) for image in images])


@pytest.mark.parametrize("negative_prompt", [None, "a red one"])
def test_pictures_are_those_of_the_pipeline_itself(pipeline, negative_prompt):
    prompts, seeds = ["a red seven", "a blue three"], [5, 6]
    drawn = draw_images(pipeline, prompts, seeds, 32, negative_prompt=negative_prompt, **RUN)
    expected = pipeline(
        prompts,
        negative_prompt=None if negative_prompt is None else [negative_prompt] * 2,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **RUN,
    ).images
    assert np.abs(pixels(drawn) - pixels(expected)).max() <= 1  # one decodes singly
    alone = draw_images(pipeline, prompts[1:], seeds[1:], 32, negative_prompt=negative_prompt, **RUN)
    assert np.abs(pixels(alone) - pixels(drawn)[1:]).max() <= 1


def test_the_pipeline_is_left_as_it_was(pipeline):
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    pipeline.scheduler.set_timesteps(7)
    modes = [module.training for module in pipeline.unet.modules()]
    steps = pipeline.scheduler.timesteps.clone()
    draw_images(pipeline, ["a red one"], [0], 32, **RUN)
    with pytest.raises(ValueError, match="divisible by 8"):
        draw_images(pipeline, ["a red one"], [0], 33, **RUN)
    assert [module.training for module in pipeline.unet.modules()] == modes
    assert torch.equal(pipeline.scheduler.timesteps, steps)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_vae_in_float32_draws_for_a_denoiser_in_bf16(pipeline, autocast):
    expected = pixels(draw_images(pipeline, ["a red one"], [0], 32, **RUN))
    pipeline.to(dtype=torch.bfloat16)
    pipeline.vae = type(pipeline.vae).from_config(pipeline.vae.config).eval()
    for name, model in (("vae", random_digits_pipeline().vae),):
        getattr(pipeline, name).load_state_dict(model.state_dict())
    types = []
    pipeline.vae.decoder.conv_out.register_forward_hook(lambda m, i, out: types.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        drawn = pixels(draw_images(pipeline, ["a red one"], [0], 32, **RUN))
    assert types == [torch.float32]
    assert drawn.shape == expected.shape
    assert pipeline.vae.dtype == torch.float32


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.5},
        {"scaling_factor": 0.5, "shift_factor": 0.25},
        {"scaling_factor": 0.5, "latents_mean": [0.1, 0.2], "latents_std": [2.0, 3.0]},
        {"scaling_factor": 0.5, "latents_mean": None, "latents_std": None, "shift_factor": None},
    ],
)
def test_scales_of_latents(config):
    vae = SimpleNamespace(config=SimpleNamespace(**config), device="cpu")
    offset, factor = latent_scale(vae)
    latents = torch.randn(3, 2, 4, 4)
    for channel in range(2):
        mean = (config.get("latents_mean") or [config.get("shift_factor") or 0.0] * 2)[channel]
        std = (config.get("latents_std") or [1.0] * 2)[channel]
        expected = (latents[:, channel] - mean) * 0.5 / std
        torch.testing.assert_close(((latents - offset) * factor)[:, channel], expected)


def test_an_empty_negative_prompt_is_none():
    args = SimpleNamespace(num_inference_steps=3, guidance_scale=2.0, negative_prompt="")
    expected = {"num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": None}
    assert sampling_arguments(args) == expected
    args.negative_prompt = "a red one"
    assert sampling_arguments(args)["negative_prompt"] == "a red one"
