from __future__ import annotations

from types import SimpleNamespace

import pytest

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.core.pipelines import denoiser_of, model_fingerprints
from tests.tiny_digits import random_digits_pipeline


def test_the_denoiser_is_the_unet_or_the_transformer():
    assert denoiser_of(SimpleNamespace(unet=None, transformer="transformer")) == "transformer"
    assert denoiser_of(SimpleNamespace(unet="unet")) == "unet"
    with pytest.raises(
        ValueError, match="`pipeline` must have a UNet or a transformer, got Simple"
    ):
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
