"""The closed form of a re-denoising step: scalar coefficients in float64, from noise levels.

A denoising step from level t to level p, `x_p = A x + B o_1` with the denoiser's output `o_1` for
`(x, t)`, is solved for `x` with its output `o_2` for `(x_p, t)` in place of `o_1` (Golden Noise for
Diffusion Models, arXiv:2411.09502, section 3.1):

    x' = x - K (o_1 - o_2),    K = -B / A.

It is `x` itself where both outputs are equal. With `a = alphas_cumprod`, `sigma = sqrt((1-a)/a)`:

    noise prediction:  K = sqrt(a_t) (sigma_t - sigma_p), a DDIM step and its inversion
    v-prediction:      K = tan(delta),  delta = atan(sigma_t) - atan(sigma_p)
    flow matching:     K = s_t - s_p, the first two noise levels of the sampler
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ext.core.noise_schedules import check_diffusion_levels
from diffusers_ext.families.family import Family


class RedenoiseCoefficients(NamedTuple):
    """`x_p = down_noise x + down_first o_1`, `x' = noise x + first o_1 + second o_2`."""

    timestep: float  # where the denoiser is asked both times
    down_noise: float
    down_first: float
    noise: float
    first: float
    second: float


def ddim_step_coefficients(
    from_alpha: float, to_alpha: float, prediction_type: str
) -> tuple[float, float]:
    """Factors of sample and output in a DDIM step (arXiv:2010.02502, equation 12, eta = 0)."""
    signal, noise = math.sqrt(from_alpha), math.sqrt(1 - from_alpha)
    to_signal, to_noise = math.sqrt(to_alpha), math.sqrt(1 - to_alpha)
    if prediction_type == "v_prediction":
        return signal * to_signal + noise * to_noise, to_noise * signal - to_signal * noise
    if prediction_type != "epsilon":
        raise ValueError(
            "`prediction_type` of the scheduler must be 'epsilon' or 'v_prediction', got "
            f"{prediction_type!r}."
        )
    if signal == 0:
        raise ValueError(
            "`prediction_type` must be 'v_prediction' where the first level has no signal, got "
            "'epsilon': noise of which nothing else is known cannot be stepped."
        )
    return to_signal / signal, to_noise - to_signal * noise / signal


def first_ddim_step(config: Any, num_steps: int) -> tuple[int, int]:
    """First timestep of a grid of `num_steps`, and the one that its DDIM step goes to.

    Args:
        config: of a diffusers scheduler; `num_train_timesteps`, `timestep_spacing`,
            `steps_offset` are read.
        num_steps: steps of the grid, from 2 to `num_train_timesteps`.
    """
    grid = DDIMScheduler.from_config(config)
    total = grid.config.num_train_timesteps
    _check_num_steps(num_steps, total)
    grid.set_timesteps(num_steps)
    # With an offset a grid of all timesteps would begin one beyond the last.
    first = min(int(grid.timesteps[0]), total - 1)
    return first, first - total // num_steps


def diffusion_coefficients(
    scheduler: Any, num_steps: int, legacy_inversion: bool = False
) -> RedenoiseCoefficients:
    """Coefficients for a model of noise or `v`, from its scheduler's levels; float64.

    Args:
        scheduler: with `alphas_cumprod`; it is only read.
        num_steps: steps of the DDIM grid; fewer make a stronger change.
        legacy_inversion: the step up as published, with a level that is one too low: `x_p` counts as
            of level `p - (t - p)` and is brought to level p, by `DDIMInverseScheduler`'s formula.
    """
    check_diffusion_levels(scheduler, "pipeline.scheduler")
    kind = scheduler.config.get("prediction_type")
    start, end = first_ddim_step(scheduler.config, num_steps)
    alphas = scheduler.alphas_cumprod.double()
    sample, output = ddim_step_coefficients(alphas[start].item(), alphas[end].item(), kind)
    if not legacy_inversion:
        return _solved(start, sample, output)
    below = 2 * end - start
    if below < 0:
        raise ValueError(
            "`num_steps` must leave a level below the step's for `legacy_inversion`, got "
            f"{num_steps}."
        )
    up = ddim_step_coefficients(alphas[below].item(), alphas[end].item(), kind)
    return RedenoiseCoefficients(start, sample, output, up[0] * sample, up[0] * output, up[1])


def flow_coefficients(
    scheduler: FlowMatchEulerDiscreteScheduler,
    num_steps: int,
    image_tokens: int,
    family: Family,
) -> RedenoiseCoefficients:
    """Coefficients for a model of velocity, from the first two levels of the pipeline's grid.

    Args:
        scheduler: only read.
        num_steps: steps of the grid; fewer make a stronger change.
        image_tokens: of one image, on which a dynamic shift of the grid depends.
        family: of the pipeline, which asks for its grid.
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            "`pipeline.scheduler` must be a FlowMatchEulerDiscreteScheduler, got a "
            f"{type(scheduler).__name__}. Put one of the model's configuration there."
        )
    _check_num_steps(num_steps, scheduler.config.num_train_timesteps)
    grid = copy.deepcopy(scheduler)
    grid.set_timesteps(
        num_steps, **family.grid_arguments(scheduler.config, num_steps, image_tokens)
    )
    start, end = grid.sigmas[:2].double().tolist()
    return _solved(grid.timesteps[0].item(), 1.0, end - start)


def _solved(timestep: float, sample: float, output: float) -> RedenoiseCoefficients:
    """The step `sample x + output o`, solved for `x`."""
    return RedenoiseCoefficients(timestep, sample, output, 1.0, output / sample, -output / sample)


def _check_num_steps(num_steps: int, total: int) -> None:
    if not isinstance(num_steps, int) or not 2 <= num_steps <= total:
        raise ValueError(f"`num_steps` must be an integer from 2 to {total}, got {num_steps}.")
