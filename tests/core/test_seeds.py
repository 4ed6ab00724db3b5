"""Every stream of random numbers starts from a seed of its own, the same on any machine."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from diffusers_ext.core.seeds import (
    check_diffusion_levels,
    check_min_snr,
    check_prediction_type,
    draw_rows,
    spread_rows,
    step_generator,
    step_seed,
    stream_generator,
    stream_seed,
    training_schedule,
)


def test_seeds_of_streams_are_those_of_earlier_versions():
    assert stream_seed(0, "target", 2) == 2619545446451684245
    drawn = torch.randn(4, generator=stream_generator(0, "target", 2))
    expected = torch.Generator().manual_seed(stream_seed(0, "target", 2))
    assert torch.equal(drawn, torch.randn(4, generator=expected))


def test_seeds_differ_by_seed_stream_and_index():
    seeds = {step_seed(seed, stream, index) for seed in (0, 1, 2**32 - 1) for stream in (1, 2) for index in range(50)}
    assert len(seeds) == 3 * 2 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_generator_of_a_step_does_not_depend_on_what_ran_before():
    expected = torch.randn(4, generator=step_generator(3, 5))
    torch.randn(10, generator=step_generator(3, 4))
    assert torch.equal(torch.randn(4, generator=step_generator(3, 5)), expected)
    for other in ((3, 6), (4, 5)):
        assert not torch.equal(torch.randn(4, generator=step_generator(*other)), expected)


def test_processes_draw_the_rows_of_one():
    whole = draw_rows(torch.randn, (6, 3), step_generator(3, 5))
    assert torch.equal(whole, torch.randn(6, 3, generator=step_generator(3, 5)))
    assert torch.equal(whole, draw_rows(torch.randn, (6, 3), torch.Generator().manual_seed(step_seed(3, 1, 5))))
    for count in (2, 3):
        generators = [step_generator(3, 5, (index, count)) for index in range(count)]
        for _ in range(2):  # the second draw too
            parts = [draw_rows(torch.randn, (6 // count, 3), generator) for generator in generators]
            assert torch.cat(parts).shape == (6, 3)
        later = step_generator(3, 5)
        draw_rows(torch.randn, (6, 3), later)
        assert torch.equal(torch.cat(parts), draw_rows(torch.randn, (6, 3), later))


def test_spread_rows_of_a_part_are_the_parts_own():
    assert spread_rows(2, 4) == [1, 3]
    assert spread_rows(4, 4) == [0, 1, 2, 3]
    assert spread_rows(0, 4) == spread_rows(0, 0) == []
    for count, rows in ((1, 2), (2, 3), (3, 8)):
        half = spread_rows(count, rows)
        assert spread_rows(2 * count, 2 * rows) == [*half, *(rows + row for row in half)]


OTHERS = (
    "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler",
    "IPNDMScheduler", "CMStochasticIterativeScheduler",
)  # fmt: skip


def test_a_scheduler_of_another_kind_is_refused():
    for name in OTHERS:
        scheduler = getattr(diffusers, name)()
        with pytest.raises(ValueError, match=f"`pipe` must have the noise levels .* a {name} with"):
            check_diffusion_levels(scheduler, "pipe")
        with pytest.raises(ValueError, match="scheduler"):
            check_prediction_type(scheduler)
    with pytest.raises(ValueError, match="a UniPCMultistepScheduler with `use_flow_sigmas`"):
        check_diffusion_levels(UniPCMultistepScheduler(use_flow_sigmas=True))


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(beta_start=0.001, beta_end=0.013, beta_schedule="scaled_linear"),
        LCMScheduler(),  # its defaults are not those of a DDPMScheduler
        EulerDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    ],
)
def test_training_takes_the_levels_of_the_model(scheduler):
    schedule = training_schedule(scheduler)
    assert isinstance(schedule, DDPMScheduler)
    assert torch.allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod, atol=1e-6)
    assert schedule.config.prediction_type == scheduler.config.prediction_type


def test_levels_that_a_configuration_does_not_tell_are_refused():
    with pytest.raises(ValueError, match="the noise levels that its configuration names"):
        training_schedule(CogVideoXDDIMScheduler(snr_shift_scale=3.0))
    with pytest.raises(ValueError, match="must be 'epsilon' or 'v_prediction', got 'sample'"):
        training_schedule(DDIMScheduler(prediction_type="sample"))


def test_weights_of_zero_by_zero_are_refused():
    zero = {"rescale_betas_zero_snr": True}
    check_min_snr(DDPMScheduler(), 5.0)
    check_min_snr(DDPMScheduler(**zero), None)
    check_min_snr(DDPMScheduler(prediction_type="v_prediction", **zero), 5.0)
    with pytest.raises(ValueError, match="`snr_gamma` must be None .*noise alone.* got 5.0"):
        check_min_snr(DDPMScheduler(**zero), 5.0)
