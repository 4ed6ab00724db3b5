from __future__ import annotations

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, FluxPipeline, HunyuanDiTPipeline

from diffusers_ext.evaluation.rendering import (
    Sampling,
    draw,
    draw_from_noise,
    latent_shape,
    shots_of,
    unit_noise,
    without_noise_model,
)
from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline
from diffusers_ext.golden_noise.redenoise import denoiser_of
from tests.evaluation.conftest import make_pipeline
from tests.golden_noise.golden_pipelines import golden_pipeline
from tests.tiny_image_pipelines import tiny_flux_pipeline, tiny_hunyuan_dit_pipeline, tiny_sd3_pipeline
from tests.tiny_pipelines import sdxl_pipeline

SHOTS = shots_of(["a red seven", "a blue one"], 1, seed=3)
PIPELINES = [make_pipeline, sdxl_pipeline, tiny_hunyuan_dit_pipeline, tiny_sd3_pipeline, tiny_flux_pipeline]


def plain_arguments(pipeline) -> dict:
    return {"use_resolution_binning": False} if isinstance(pipeline, HunyuanDiTPipeline) else {}


@pytest.mark.parametrize("make", PIPELINES)
def test_unit_noise_draws_what_the_plain_pipeline_draws_from_the_seed(make):
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    shape = latent_shape(pipeline, 64, 48)
    height, width = (size * pipeline.vae_scale_factor for size in shape[1:])
    assert (height, width) == (64, 48)
    noise = unit_noise(SHOTS, shape)
    assert noise.dtype == torch.float32
    sampling = Sampling(2, 3.0, None, height, width)
    expected = draw(pipeline, SHOTS, sampling, **plain_arguments(pipeline))
    found = draw_from_noise(pipeline, SHOTS, Sampling(2, 3.0), noise)
    assert torch.equal(found, expected)
    assert not torch.equal(draw_from_noise(pipeline, SHOTS, Sampling(2, 3.0), -noise), expected)


@pytest.mark.parametrize("make", PIPELINES)
def test_the_shape_without_a_size_is_the_pipelines_own(make):
    pipeline = make()
    shape = latent_shape(pipeline)
    size = pipeline.default_sample_size if hasattr(pipeline, "default_sample_size") else 8
    assert shape[1:] == (size, size)
    channels = denoiser_of(pipeline).config.in_channels
    assert shape[0] == (channels // 4 if isinstance(pipeline, FluxPipeline) else channels)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of this scheduler, with numpy 2
def test_a_sampler_that_adds_noise_draws_as_from_its_seed():
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    pipeline = make_pipeline()
    pipeline.scheduler = EulerAncestralDiscreteScheduler(**config)
    expected = draw(pipeline, SHOTS, Sampling(3, 3.0))
    noise = unit_noise(SHOTS, latent_shape(pipeline))
    found = draw_from_noise(pipeline, SHOTS, Sampling(3, 3.0), noise)
    assert torch.equal(found, expected)


def test_each_noise_depends_on_its_seed_alone():
    noise = unit_noise(SHOTS, (4, 8, 8))
    assert torch.equal(unit_noise(SHOTS[1:], (4, 8, 8)), noise[1:])
    generator = torch.Generator().manual_seed(SHOTS[0].seed)
    assert torch.equal(noise[0], torch.randn(4, 8, 8, generator=generator))


def test_a_golden_pipeline_is_plain_for_a_while():
    pipeline = golden_pipeline("sd")
    network, config = pipeline.noise_model, dict(pipeline.config)
    assert isinstance(pipeline, GoldenNoisePipeline)

    def stop() -> None:
        with without_noise_model(pipeline):
            assert pipeline.noise_model is None
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert pipeline.noise_model is network
    assert dict(pipeline.config) == config
    plain = make_pipeline()
    with without_noise_model(plain):
        assert not hasattr(plain, "noise_model")


@pytest.mark.parametrize("make", [tiny_hunyuan_dit_pipeline, tiny_flux_pipeline])
def test_half_a_token_is_cut_off_as_the_pipeline_does(make):
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    shape = latent_shape(pipeline, 9 * pipeline.vae_scale_factor, 8 * pipeline.vae_scale_factor)
    assert shape[1:] == (8, 8)
    pixels = draw_from_noise(pipeline, SHOTS, Sampling(2, 3.0), unit_noise(SHOTS, shape))
    assert pixels.shape[-2:] == (8 * pipeline.vae_scale_factor,) * 2
