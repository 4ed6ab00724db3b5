from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch

from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline
from tests.golden_noise.golden_pipelines import FAMILIES, draw, golden_pipeline

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_the_call_shows_the_arguments_of_the_plain_pipeline(family):
    plain, golden = type(FAMILIES[family].plain()), FAMILIES[family].golden
    expected = dict(inspect.signature(plain.__call__).parameters)
    shown = dict(inspect.signature(golden.__call__).parameters)
    scale, diversity, way = (shown.pop(name) for name in ("golden_noise_scale", "diversity", "diversity_of"))
    assert shown == expected
    assert (way.default, way.kind) == ("prediction", inspect.Parameter.KEYWORD_ONLY)
    assert (scale.default, scale.kind) == (1.0, inspect.Parameter.KEYWORD_ONLY)
    assert (diversity.default, diversity.kind) == (0.0, inspect.Parameter.KEYWORD_ONLY)
    assert "golden_noise_scale" in golden.__call__.__doc__
    assert inspect.getdoc(plain.__call__) in golden.__call__.__doc__
    for name in ("encode_prompt", "prepare_latents"):
        signatures = [inspect.signature(getattr(owner, name)) for owner in (plain, golden)]
        assert signatures[0] == signatures[1]


class Louder(GoldenNoisePipeline):
    """A user's own pipeline over a golden one."""

    def __call__(self, *args, loudness: float = 1.0, **kwargs):
        return super().__call__(*args, golden_noise_scale=loudness, **kwargs)


def test_pipelines_derived_from_golden_ones_keep_their_own_call():
    pipeline = golden_pipeline("sd")
    derived = Louder.from_pipe(pipeline)
    derived.set_progress_bar_config(disable=True)
    assert draw(derived, "sd").equal(draw(pipeline, "sd"))
    assert draw(derived, "sd", loudness=0).equal(draw(pipeline, "sd", golden_noise_scale=0))


@every_family
def test_nothing_of_a_call_is_left_in_the_pipeline(family):
    pipeline = golden_pipeline(family)
    picture = draw(pipeline, family)
    assert pipeline._golden_call is None

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipeline, family, callback_on_step_end=fail)
    assert pipeline._golden_call is None
    training = [part for part in pipeline.noise_model.modules() if part.training]
    assert training == []
    assert draw(pipeline, family).equal(picture)


def test_a_call_inside_a_call_has_its_own_noise():
    pipeline = golden_pipeline("sd")
    plain, golden = draw(pipeline, "sd", golden_noise_scale=0), draw(pipeline, "sd")
    inner = []

    def draw_another(*_):
        inner.append(draw(pipeline, "sd", golden_noise_scale=0, num_inference_steps=2))
        pipeline.scheduler.set_timesteps(2)
        return {}

    assert draw(pipeline, "sd", callback_on_step_end=draw_another).equal(golden)
    assert all(picture.equal(plain) for picture in inner)


@pytest.mark.parametrize("scale", ["1", None, True, torch.ones(2)])
def test_scales_that_are_no_numbers_are_refused(scale):
    with pytest.raises(TypeError, match="`golden_noise_scale` must be a number, got a "):
        draw(golden_pipeline("sd"), "sd", golden_noise_scale=scale)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scales_that_are_not_finite_are_refused(scale):
    pipeline = GoldenNoisePipeline.from_pipe(FAMILIES["sd"].plain())
    with pytest.raises(ValueError, match=f"`golden_noise_scale` must be finite, got {scale}"):
        draw(pipeline, "sd", golden_noise_scale=scale)
    assert draw(pipeline, "sd", golden_noise_scale=np.float32(0.5)).shape == (1, 3, 32, 32)


@every_family
def test_unknown_keywords_are_refused_with_what_was_meant(family):
    pipeline = golden_pipeline(family)
    with pytest.raises(TypeError, match="'golden_scale'.*Did you mean 'golden_noise_scale'"):
        draw(pipeline, family, golden_scale=1)
    pipeline.set_noise_model(None)
    with pytest.raises(TypeError, match="'num_inference_step'.*Did you mean 'num_inference_steps'"):
        draw(pipeline, family, num_inference_step=1)
