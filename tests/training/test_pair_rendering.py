from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.settings import ModelSettings, SamplingSettings
from diffusers_ext.families import find_family
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from diffusers_ext.golden_noise.redenoise import encode_prompts
from diffusers_ext.training.golden_noise.rendering import load_base_pipeline, render, square_latent_shape
from examples.digits.check_model import MODEL_DIR
from tests.golden_noise.golden_pipelines import FAMILIES, PROMPTS
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_pipelines import pixart_pipeline


def sampling(steps: int, guidance: float, negative: str) -> SamplingSettings:
    return SamplingSettings(num_inference_steps=steps, guidance_scale=guidance, negative_prompt=negative)


SEEDS = [5, 2**62 + 6]


def rendered(pipeline, pixels: int, settings: SamplingSettings) -> np.ndarray:
    shape = square_latent_shape(pipeline, pixels)
    noise = torch.stack([source_noise(seed, shape) for seed in SEEDS])
    text = encode_prompts(pipeline, PROMPTS, settings.negative_prompt or None)
    images = render(pipeline, noise, text, settings, SEEDS)
    assert [image.size for image in images] == [(pixels, pixels)] * 2
    return np.stack([np.asarray(image) for image in images]).astype(int)


def drawn(pipeline, pixels: int, **arguments) -> np.ndarray:
    images = pipeline(
        prompt=list(PROMPTS),  # into which Z-Image's call writes
        height=pixels,
        width=pixels,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        **arguments,
    ).images
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_seed_is_the_picture_that_the_pipeline_draws_from_it(family):
    """Unit noise is what every family takes, packed or not, scaled by its scheduler or not."""
    pipeline, pixels = FAMILIES[family].plain(), FAMILIES[family].pixels
    pipeline.set_progress_bar_config(disable=True)
    guidance = find_family(pipeline).guidance_arguments(denoiser_of(pipeline).config, 3.0)
    guidance |= {name: [text] * 2 for name, text in guidance.items() if name == "negative_prompt"}
    expected = drawn(pipeline, pixels, num_inference_steps=2, **guidance, **FAMILIES[family].call)
    found = rendered(pipeline, pixels, sampling(2, 3.0, ""))
    assert expected.std() > 1
    assert abs(found - expected).max() <= 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
@pytest.mark.parametrize("sampler", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_a_sampler_with_large_sigmas_and_a_negative_prompt(sampler):
    pipeline = random_digits_pipeline()
    pipeline.scheduler = sampler.from_config(pipeline.scheduler.config)
    run = {"num_inference_steps": 2, "guidance_scale": 3.0}
    expected = drawn(pipeline, 24, negative_prompt=["a red two"] * 2, **run)
    assert pipeline.scheduler.init_noise_sigma > 10
    before = pipeline.scheduler
    steps = before.timesteps.tolist()
    found = rendered(pipeline, 24, sampling(2, 3.0, "a red two"))
    assert abs(found - expected).max() <= 1
    assert abs(rendered(pipeline, 24, sampling(2, 3.0, "")) - expected).max() > 1
    assert pipeline.scheduler is before
    assert before.timesteps.tolist() == steps


def test_pictures_that_are_not_finite():
    pipeline = random_digits_pipeline()
    pipeline.vae.post_quant_conv.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="must draw finite pictures, got NaN or infinite pixels"):
        rendered(pipeline, 32, sampling(1, 1.0, ""))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_latent_shape_is_that_of_the_pipelines_own_latents(family):
    pipeline = FAMILIES[family].plain()
    pipeline.set_progress_bar_config(disable=True)
    channels, height, width = square_latent_shape(pipeline, None)
    assert height == width
    assert (
        channels == {"flux2": 16, "flux2_dev": 16, "qwen_image": 4}.get(family) or pipeline.vae.config.latent_channels
    )
    side = find_family(pipeline).pixels_per_latent(pipeline)
    assert square_latent_shape(pipeline, height * side) == (channels, height, width)


def test_a_size_that_the_model_cannot_draw():
    with pytest.raises(ValueError, match="`output_size` must be divisible by 4 .* got 30"):
        square_latent_shape(random_digits_pipeline(), 30)
    with pytest.raises(ValueError, match="`output_size` must be divisible by .*Flux.*, got 20"):
        square_latent_shape(FAMILIES["flux"].plain(), 20)


def arguments(path) -> ModelSettings:
    return ModelSettings(pretrained_model_name_or_path=str(path), output_dir="out")


def test_the_base_pipeline_is_frozen_and_unfiltered():
    pipeline = load_base_pipeline(arguments(MODEL_DIR), torch.device("cpu"), torch.bfloat16)
    assert pipeline.safety_checker is None
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in pipeline.unet.parameters())


def test_what_is_no_pipeline_of_a_known_family(tmp_path):
    with pytest.raises(ValueError, match="must be a folder or Hub name of a pipeline, got .*none"):
        load_base_pipeline(arguments(tmp_path / "none"), torch.device("cpu"), torch.float32)
    pixart_pipeline().save_pretrained(tmp_path / "pixart")
    with pytest.raises(ValueError, match="`pipeline` must be one of .* got a PixArtAlphaPipeline"):
        load_base_pipeline(arguments(tmp_path / "pixart"), torch.device("cpu"), torch.float32)


def test_pictures_are_decoded_one_by_one_and_the_vae_is_left_as_it_was():
    pipeline = random_digits_pipeline()
    sizes = []
    handle = pipeline.vae.decoder.register_forward_pre_hook(lambda _, a: sizes.append(len(a[0])))
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = encode_prompts(pipeline, ["a red two"] * 3)
    render(pipeline, noise, text, sampling(1, 1.0, ""), [0, 1, 2])
    handle.remove()
    assert sizes == [1, 1, 1]
    assert pipeline.vae.use_slicing is False
    pipeline.vae.decoder.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        render(pipeline, noise, text, sampling(1, 1.0, ""), [0, 1, 2])
    assert pipeline.vae.use_slicing is False
