from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ext.families.flux import Flux
from diffusers_ext.families.sd3 import SD3
from diffusers_ext.golden_noise.redenoise import (
    ddim_step_coefficients,
    diffusion_coefficients,
    first_ddim_step,
    flow_coefficients,
)


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


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(10, (1.079, -0.416, 0.342)), (50, (1.003, -0.110, 0.107))]
)
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
    assert (found.down_noise, found.down_first) == pytest.approx(
        (math.cos(delta), -math.sin(delta))
    )
    assert found[3:] == pytest.approx((1.0, -math.tan(delta), math.tan(delta)))


def test_a_first_level_without_signal_needs_v_prediction():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    found = diffusion_coefficients(sdxl_scheduler(prediction_type="v_prediction", **config), 10)
    assert found.timestep == 999
    assert 0 < found.second < 1
    with pytest.raises(
        ValueError, match="`prediction_type` must be 'v_prediction' where the first"
    ):
        diffusion_coefficients(sdxl_scheduler(**config), 10)


def test_other_prediction_types_are_refused():
    for kind in ("sample", None):
        with pytest.raises(ValueError, match=f"must be 'epsilon' or 'v_prediction', got {kind!r}"):
            ddim_step_coefficients(0.1, 0.2, kind)
    with pytest.raises(ValueError, match="'epsilon' or 'v_prediction', got 'sample'"):
        diffusion_coefficients(DDPMScheduler(prediction_type="sample"), 10)


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
