from __future__ import annotations

from types import SimpleNamespace

import pytest
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.core.pipelines import denoiser_of, model_fingerprints, register_auto_pipeline
from tests.golden_noise.golden_pipelines import FAMILIES, golden_pipeline
from tests.tiny_digits import random_digits_pipeline

LOST = "has no `noise_model`: its class takes none. Make the noise with `noise_model.refine`"


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_pipelines_find_the_pipelines_of_all_families(family, caplog):
    pipeline = golden_pipeline(family)
    again = AutoPipelineForText2Image.from_pipe(pipeline)
    assert type(again) is type(pipeline)
    assert again.noise_model is pipeline.noise_model
    assert LOST not in caplog.text


@pytest.mark.parametrize(
    ("maker", "made"),
    [
        (AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline),
        (AutoPipelineForInpainting, StableDiffusionInpaintPipeline),
        (StableDiffusionImg2ImgPipeline, StableDiffusionImg2ImgPipeline),
        (StableDiffusionPipeline, StableDiffusionPipeline),
    ],
)
def test_what_is_left_behind_is_said_once(maker, made, caplog):
    pipeline = golden_pipeline("sd")
    other = maker.from_pipe(pipeline)
    assert type(other) is made
    assert "noise_model" not in other.components
    assert other.unet is pipeline.unet
    assert caplog.text.count(LOST) == 1
    caplog.clear()
    pipeline.set_noise_model(None)
    maker.from_pipe(pipeline)
    type(pipeline).from_pipe(pipeline)
    assert LOST not in caplog.text


def test_plain_pipelines_stay_what_auto_pipelines_make():
    plain = FAMILIES["sd"].plain()
    assert type(AutoPipelineForText2Image.from_pipe(plain)) is StableDiffusionPipeline
    other = AutoPipelineForImage2Image.from_pipe(plain)
    assert type(AutoPipelineForText2Image.from_pipe(other)) is StableDiffusionPipeline


def test_pipelines_that_auto_pipelines_do_not_know_are_left_alone():
    from diffusers.pipelines import auto_pipeline

    before = dict(auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING)
    register_auto_pipeline(DiffusionPipeline)
    assert before == auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING


def test_the_denoiser_is_the_unet_or_the_transformer():
    assert denoiser_of(SimpleNamespace(unet=None, transformer="transformer")) == "transformer"
    assert denoiser_of(SimpleNamespace(unet="unet")) == "unet"
    with pytest.raises(ValueError, match="`pipeline` must have a UNet or a transformer, got Simple"):
        denoiser_of(SimpleNamespace(vae="vae"))


def test_fingerprints_are_of_the_named_models():
    pipeline = random_digits_pipeline()
    assert model_fingerprints(pipeline, ["denoiser", "text_encoder"]) == {
        "denoiser": fingerprint(pipeline.unet),
        "text_encoder": fingerprint(pipeline.text_encoder),
    }
    pipeline.text_encoder = None
    assert list(model_fingerprints(pipeline, ["text_encoder", "denoiser"])) == ["denoiser"]
    with pytest.raises(ValueError, match="'text_encoder_2', which StableDiffusionPipeline lacks"):
        model_fingerprints(pipeline, ["text_encoder_2"])
