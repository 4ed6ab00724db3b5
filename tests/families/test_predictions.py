"""Noise, velocity and x_0 turn into each other, as diffusers' own schedulers have them."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffusers_ext.families.cogvideox import CogVideoX
from diffusers_ext.families.predictions import (
    PREDICTION_TYPES,
    Level,
    convert_prediction,
    diffusion_level,
    predicted_noise,
    predicted_of,
    predicted_x_0,
    scheduler_level,
    step_factors,
)
from diffusers_ext.families.sd3 import SD3

DIFFUSION = ("epsilon", "sample", "v_prediction")
TIMESTEPS = torch.tensor([1, 500, 999])


def x_0_noise():
    return torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def x_0_and_noise(*given):
    return predicted_x_0(*given), predicted_noise(*given)


def level_of(kind, x_t):
    """As a family of the prediction type has it."""
    flow = kind == "flow_prediction"
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDPMScheduler()
    return scheduler_level(scheduler, TIMESTEPS, x_t, flow_matching=flow)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_right_prediction_gives_x_0_and_noise_back(kind):
    x_0, noise = x_0_noise()
    level = level_of(kind, x_0)
    x_t = level.signal * x_0 + level.sigma * noise
    found = x_0_and_noise(predicted_of(x_0, noise, level, kind), x_t, level, kind)
    torch.testing.assert_close(found, (x_0, noise))


@pytest.mark.parametrize("source", PREDICTION_TYPES)
def test_predictions_are_converted_there_and_back(source):
    others = DIFFUSION if source in DIFFUSION else ("epsilon", "sample", "flow_prediction")
    x_t, output = x_0_noise()
    level = level_of(source, x_t)
    for target in others:
        there = convert_prediction(output, x_t, level, source, target)
        torch.testing.assert_close(x_0_and_noise(there, x_t, level, target), x_0_and_noise(output, x_t, level, source))
        torch.testing.assert_close(convert_prediction(there, x_t, level, target, source), output)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, CogVideoXDDIMScheduler])
def test_velocity_is_that_of_diffusers_to_the_bit_at_all_levels(scheduler_class):
    scheduler, timesteps = scheduler_class(prediction_type="v_prediction"), torch.arange(1000)
    x_0, noise = torch.randn(2, 1000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    level = scheduler_level(scheduler, timesteps, x_0)
    expected = scheduler.get_velocity(x_0, noise, timesteps)
    assert torch.equal(predicted_of(x_0, noise, level, "v_prediction"), expected)
    noisy = scheduler.add_noise(x_0, noise, timesteps)
    assert torch.equal(level.signal * x_0 + level.sigma * noise, noisy)


@pytest.mark.parametrize("kind", DIFFUSION)
def test_x_0_and_steps_are_those_of_ddim(kind):
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    x_t, output = (tensor.float() for tensor in x_0_noise())
    expected = scheduler.step(output, 500, x_t)
    level, to = (diffusion_level(scheduler.alphas_cumprod[t]) for t in (500, 400))
    x_0, noise = x_0_and_noise(output, x_t, level, kind)
    torch.testing.assert_close(x_0, expected.pred_original_sample)
    sample, model_output = step_factors(level, to, kind)
    torch.testing.assert_close(sample * x_t + model_output * output, expected.prev_sample)
    torch.testing.assert_close(to.signal * x_0 + to.sigma * noise, expected.prev_sample)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_levels_and_steps_are_those_of_its_scheduler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(5)
    x_0, noise = (tensor.float() for tensor in x_0_noise())
    timesteps = scheduler.timesteps[1:4]
    level = SD3().level(scheduler, timesteps, x_0)
    x_t = level.signal * x_0 + level.sigma * noise
    torch.testing.assert_close(x_t, scheduler.scale_noise(x_0, timesteps, noise))
    # One of the rows, as the scheduler takes all rows at one level.
    output, sigmas = predicted_of(x_0, noise, level, SD3().prediction_type(scheduler))[1], scheduler.sigmas[2:4]
    levels = (Level(1 - sigma, sigma) for sigma in sigmas)
    sample, model_output = step_factors(*levels, "flow_prediction")
    expected = scheduler.step(output, timesteps[1], x_t[1]).prev_sample
    torch.testing.assert_close(sample * x_t[1] + model_output * output, expected)


def test_a_family_knows_what_its_model_predicts():
    assert SD3().prediction_type(FlowMatchEulerDiscreteScheduler()) == "flow_prediction"
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction")
    assert CogVideoX().prediction_type(scheduler) == "v_prediction"
    clip = torch.zeros(2, 3, 4, 8, 8)
    signal, sigma = CogVideoX().level(scheduler, torch.tensor([0, 999]), clip)
    assert signal.shape == (2, 1, 1, 1, 1)
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones_like(signal))


def test_what_cannot_be_converted_is_refused():
    x_0, noise = x_0_noise()
    level = level_of("epsilon", x_0)
    for refused in (predicted_of, predicted_x_0, predicted_noise):
        with pytest.raises(ValueError, match=r"`prediction_type` must be one of \['epsilon', .* got 'v'"):
            refused(x_0, noise, level, "v")
    with pytest.raises(ValueError, match="must be one of .* got None"):
        step_factors(level, level, None)
    with pytest.raises(ValueError, match="must be 'v_prediction' where the first level has no signal"):
        step_factors(Level(0.0, 1.0), Level(0.1, 0.9), "epsilon")
    with pytest.raises(ValueError, match="`scheduler` must have the noise levels of `alphas_cumprod`"):
        scheduler_level(EDMEulerScheduler(), TIMESTEPS, x_0)
