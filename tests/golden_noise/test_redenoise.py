from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.families.flux import Flux
from diffusers_ext.families.sd3 import SD3
from diffusers_ext.golden_noise.noise_statistics import match_energy
from diffusers_ext.golden_noise.redenoise import (
    diffusion_coefficients,
    encode_prompts,
    first_ddim_step,
    flow_coefficients,
    guided_prediction,
    redenoise,
    redenoise_sequence,
    redenoise_text,
    step_coefficients,
)
from tests.golden_noise.redenoise_cases import BUILDERS, PROMPTS, pipeline_first_step, unit_noise


def with_prediction_type(family: str, prediction_type: str):
    pipeline = BUILDERS[family]()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    return pipeline


@pytest.mark.parametrize("num_steps", [2, 4, 10])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@torch.no_grad()
def test_noise_models_step_down_and_are_inverted_by_diffusers_schedulers(family, num_steps):
    pipeline = with_prediction_type(family, "epsilon")
    text, noise = encode_prompts(pipeline, PROMPTS), unit_noise(pipeline)
    down = DDIMScheduler.from_config(pipeline.scheduler.config)
    up = DDIMInverseScheduler.from_config(pipeline.scheduler.config)
    down.set_timesteps(num_steps)
    up.set_timesteps(num_steps)
    t = down.timesteps[0]
    first = pipeline_first_step(pipeline, noise, 5.5, num_steps=num_steps)
    assert first.timestep == t
    lower = down.step(first.prediction, t, noise).prev_sample
    second = guided_prediction(pipeline, lower, t, text, 1.0)
    found = redenoise_text(pipeline, noise, text, num_steps=num_steps)
    torch.testing.assert_close(found, up.step(second, t, lower).prev_sample, rtol=1e-4, atol=1e-4)
    assert (found - noise).norm() > 0.05 * noise.norm()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_legacy_inversion_begins_one_level_too_low(prediction_type):
    pipeline = with_prediction_type("sd", prediction_type)
    text, noise = encode_prompts(pipeline, PROMPTS), unit_noise(pipeline)
    down = DDIMScheduler.from_config(pipeline.scheduler.config)
    up = DDIMInverseScheduler.from_config(pipeline.scheduler.config)
    down.set_timesteps(10)
    up.set_timesteps(10)
    t, p = down.timesteps[:2]
    lower = down.step(guided_prediction(pipeline, noise, t, text, 5.5), t, noise).prev_sample
    second = guided_prediction(pipeline, lower, t, text, 1.0)
    found = redenoise_text(pipeline, noise, text, legacy_inversion=True)
    torch.testing.assert_close(found, up.step(second, p, lower).prev_sample, rtol=1e-4, atol=1e-4)
    assert (found - redenoise_text(pipeline, noise, text)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["sd", "sdxl", "hunyuan_dit"])
@torch.no_grad()
def test_golden_noise_of_a_v_model_steps_down_to_the_same_point(family):
    """The step up is the scheduler's step down, solved for its sample."""
    pipeline = with_prediction_type(family, "v_prediction")
    text, noise = encode_prompts(pipeline, PROMPTS), unit_noise(pipeline)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[0]
    first = pipeline_first_step(pipeline, noise, 5.5)
    lower = scheduler.step(first.prediction, t, noise).prev_sample
    second = guided_prediction(pipeline, lower, t, text, 1.0)
    found = redenoise_text(pipeline, noise, text)
    torch.testing.assert_close(scheduler.step(second, t, found).prev_sample, lower, rtol=1e-5, atol=1e-5)
    assert (found - noise).abs().max() > 1e-3


@pytest.mark.parametrize("num_steps", [4, 10])
@pytest.mark.parametrize("family", ["sd3", "flux_dev", "flux_schnell"])
@torch.no_grad()
def test_golden_noise_of_a_flow_model_steps_down_to_the_same_point(family, num_steps):
    pipeline = BUILDERS[family]()
    text, noise = encode_prompts(pipeline, PROMPTS), unit_noise(pipeline)
    first = pipeline_first_step(pipeline, noise, 5.5, num_steps=num_steps)
    # The pipeline's own call has just set its scheduler to its grid.
    scheduler = pipeline.scheduler
    t = scheduler.timesteps[0]
    lower = copy.deepcopy(scheduler).step(first.prediction, t, noise).prev_sample
    second = guided_prediction(pipeline, lower, t, text, 1.0)
    found = redenoise_text(pipeline, noise, text, num_steps=num_steps)
    back = copy.deepcopy(scheduler).step(second, t, found).prev_sample
    torch.testing.assert_close(back, lower, rtol=1e-5, atol=1e-5)
    assert (found - noise).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "prediction_type"), [("sd", "epsilon"), ("sd", "v_prediction"), ("sdxl", "epsilon"), ("sd3", None)]
)
def test_a_constant_prediction_leaves_the_noise_as_it_is(family, prediction_type, monkeypatch):
    pipeline = BUILDERS[family]()
    if prediction_type is not None:
        pipeline = with_prediction_type(family, prediction_type)
    text, noise = encode_prompts(pipeline, PROMPTS), unit_noise(pipeline)
    torch.manual_seed(0)
    constant = torch.randn_like(noise[:1])

    def predict(sample=None, *_, hidden_states=None, **__):
        latents = hidden_states if sample is None else sample
        return (constant.expand(len(latents), -1, -1, -1),)

    monkeypatch.setattr(denoiser_of(pipeline), "forward", predict)
    for scale in (1.0, 5.5):
        assert torch.equal(redenoise_text(pipeline, noise, text, w1=scale, w2=scale), noise)


@pytest.mark.parametrize("family", BUILDERS)
def test_two_calls_and_a_pipeline_as_it_was(family, monkeypatch):
    pipeline = BUILDERS[family]()
    denoiser = denoiser_of(pipeline)
    denoiser.train()
    next(iter(denoiser.children())).eval()
    pipeline._guidance_scale = 7.0
    pipeline.scheduler.set_timesteps(3, **({"mu": 0.6} if family == "flux_dev" else {}))
    text, noise = encode_prompts(pipeline, PROMPTS), unit_noise(pipeline)
    calls, forward, scheduler = [], denoiser.forward, pipeline.scheduler

    def state():
        modes = [module.training for module in denoiser.modules()]
        values = {k: str(v) for k, v in vars(pipeline.scheduler).items()}
        hooks = [len(module._forward_pre_hooks) for module in denoiser.modules()]
        return modes, values, hooks, dict(vars(pipeline))

    def watched(*args, **kwargs):
        assert not any(module.training for module in denoiser.modules())
        assert not torch.is_grad_enabled()
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(denoiser, "forward", watched)
    before, latents = state(), noise.clone()
    result = redenoise_text(pipeline, noise, text)
    assert len(calls) == 2
    assert not result.requires_grad
    assert torch.equal(noise, latents)
    with pytest.raises(RuntimeError, match="out of memory"):
        redenoise_text(pipeline, noise, text)
    assert state() == before
    assert pipeline.scheduler is scheduler


@pytest.mark.parametrize("family", ["sd", "sdxl", "hunyuan_dit", "sd3", "flux_dev"])
def test_separate_tensors_and_one_object_are_the_same(family):
    pipeline = BUILDERS[family]()
    text, noise = encode_prompts(pipeline, PROMPTS), unit_noise(pipeline)
    fields = text.tensors()
    positional = [fields.pop("prompt_embeds"), fields.pop("negative_prompt_embeds", None)]
    found = redenoise(pipeline, noise, *positional, num_steps=4, w1=4.0, w2=2.0, **fields)
    assert torch.equal(found, redenoise_text(pipeline, noise, text, num_steps=4, w1=4.0, w2=2.0))
    assert found.dtype == torch.float32
    assert not torch.equal(found, redenoise_text(pipeline, noise, text, num_steps=4, w1=4.0))


def test_each_sample_has_its_own_prompt():
    pipeline = BUILDERS["sd"]()
    text, noise = encode_prompts(pipeline, PROMPTS), unit_noise(pipeline)
    both = redenoise_text(pipeline, noise, text)
    for index in range(2):
        alone = redenoise_text(pipeline, noise[[index]], text[[index]])
        torch.testing.assert_close(both[[index]], alone, rtol=1e-5, atol=1e-5)
    swapped = redenoise_text(pipeline, noise, text[[1, 0]])
    assert (swapped - both).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_and_latents_give_float32(dtype):
    pipeline = BUILDERS["sd"]()
    text, noise = encode_prompts(pipeline, PROMPTS), unit_noise(pipeline)
    full = redenoise_text(pipeline, noise.to(dtype), text)
    pipeline.unet.to(dtype)
    half = redenoise_text(pipeline, noise.to(dtype), text)
    assert half.dtype == torch.float32
    assert 0 < (half - full).norm() / full.norm() < 0.02


def test_the_samplers_scheduler_may_be_any_of_the_model():
    pipeline = BUILDERS["sd"]()
    text, noise = encode_prompts(pipeline, PROMPTS), unit_noise(pipeline)
    expected = redenoise_text(pipeline, noise, text)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    found = redenoise_text(pipeline, noise, text)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_sequence_feeds_each_noise_on_at_its_sources_energy():
    pipeline = BUILDERS["sd"]()
    text, noise = encode_prompts(pipeline, PROMPTS), unit_noise(pipeline)
    arguments = {"num_steps": 4, "w1": 4.0, "w2": 2.0, "legacy_inversion": True}
    found = redenoise_sequence(pipeline, noise, text, repeats=3, **arguments)
    assert found.shape == (2, 3, 4, 8, 8)
    state = noise
    for step in range(3):
        state = match_energy(redenoise_text(pipeline, state, text, **arguments), noise)
        assert torch.equal(found[:, step], state)
    for repeats in (0, 1.5):
        with pytest.raises(ValueError, match="`repeats` must be an integer of at least 1, got"):
            redenoise_sequence(pipeline, noise, text, repeats=repeats)


def test_a_dynamic_shift_follows_the_size_of_the_image():
    pipeline = BUILDERS["flux_dev"]()
    small, large = (step_coefficients(pipeline, size) for size in ((8, 8), (128, 128)))
    assert large.second < small.second


def sdxl_scheduler(**changes) -> DDIMScheduler:
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
    }
    return DDIMScheduler(**{**config, **changes})


@pytest.mark.parametrize(
    ("num_steps", "first", "then", "strength"),
    [
        (4, 751, 501, 0.588),
        (10, 901, 801, 0.385),
        (20, 951, 901, 0.238),
        (28, 946, 911, 0.174),
        (50, 981, 961, 0.110),
        (1000, 999, 998, 0.0060),
    ],
)
def test_strength_by_the_number_of_steps(num_steps, first, then, strength):
    scheduler = sdxl_scheduler()
    assert first_ddim_step(scheduler.config, num_steps) == (first, then)
    found = diffusion_coefficients(scheduler, num_steps)
    assert found.timestep == first
    assert found.noise == 1
    assert found.second == -found.first == pytest.approx(strength, abs=6e-4)
    a, b = (scheduler.alphas_cumprod[i].item() for i in (first, then))
    sigmas = [math.sqrt((1 - x) / x) for x in (a, b)]
    assert found.second == pytest.approx(math.sqrt(a) * (sigmas[0] - sigmas[1]), rel=1e-9)


@pytest.mark.parametrize(("num_steps", "expected"), [(10, (1.079, -0.416, 0.342)), (50, (1.003, -0.110, 0.107))])
def test_published_coefficients_of_the_legacy_inversion(num_steps, expected):
    found = diffusion_coefficients(sdxl_scheduler(), num_steps, legacy_inversion=True)
    assert found[3:] == pytest.approx(expected, abs=6e-4)


def test_steps_are_those_of_the_samplers_grid(subtests):
    for spacing in ["leading", "trailing", "linspace"]:
        for num_steps in [2, 7, 10, 30]:
            with subtests.test(spacing=spacing, num_steps=num_steps):
                scheduler = sdxl_scheduler(timestep_spacing=spacing)
                t, p = first_ddim_step(scheduler.config, num_steps)
                scheduler.set_timesteps(num_steps)
                assert t == scheduler.timesteps[0]
                assert p == t - 1000 // num_steps
                torch.manual_seed(0)
                sample, output = torch.randn(2, 1, 4, 8, 8)
                found = diffusion_coefficients(scheduler, num_steps)
                torch.testing.assert_close(
                    found.down_noise * sample + found.down_first * output,
                    scheduler.step(output, t, sample).prev_sample,
                    rtol=1e-4,
                    atol=1e-4,
                )


def test_v_prediction_rotates_by_the_angle_between_the_levels():
    scheduler = sdxl_scheduler(prediction_type="v_prediction")
    found = diffusion_coefficients(scheduler, 10)
    angles = [math.acos(math.sqrt(scheduler.alphas_cumprod[i].item())) for i in (901, 801)]
    delta = angles[0] - angles[1]
    assert (found.down_noise, found.down_first) == pytest.approx((math.cos(delta), -math.sin(delta)))
    assert found[3:] == pytest.approx((1.0, -math.tan(delta), math.tan(delta)))


def test_a_first_level_without_signal_needs_v_prediction():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    found = diffusion_coefficients(sdxl_scheduler(prediction_type="v_prediction", **config), 10)
    assert found.timestep == 999
    assert 0 < found.second < 1
    with pytest.raises(ValueError, match="`prediction_type` must be 'v_prediction' where the first"):
        diffusion_coefficients(sdxl_scheduler(**config), 10)


def test_other_prediction_types_are_refused():
    for kind in ("sample", None):
        with pytest.raises(ValueError, match=f"must be 'epsilon' or 'v_prediction', got {kind!r}"):
            diffusion_coefficients(DDPMScheduler(prediction_type=kind), 10)


def test_flow_matching_takes_the_first_step_of_the_shifted_grid():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = {k: str(v) for k, v in vars(scheduler).items()}
    found = flow_coefficients(scheduler, 10, 1024, SD3())
    assert {k: str(v) for k, v in vars(scheduler).items()} == before
    # Ten levels from 1 to the last one's 0.003 (shifted at construction), and the shift again.
    scheduler.set_timesteps(10)
    second = scheduler.sigmas[1].item()
    assert found == (1000.0, 1.0, second - 1, 1.0, second - 1, 1 - second)
    found = flow_coefficients(FlowMatchEulerDiscreteScheduler(shift=3.0), 10, 1024, Flux())
    assert found.second == pytest.approx(1 - 3 * 0.9 / (1 + 2 * 0.9), rel=1e-5)


def test_a_dynamic_shift_depends_on_the_image_tokens():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens, mu in ((256, 0.5), (4096, 1.15)):
        found = flow_coefficients(scheduler, 10, tokens, Flux())
        shifted = math.exp(mu) / (math.exp(mu) + (1 / 0.9 - 1))
        assert found.second == pytest.approx(1 - shifted, rel=1e-5)
