"""What a denoiser predicts, and the ways between noise, velocity and x_0.

At a level `(signal, sigma)` of the noise schedule, `x_t = signal x_0 + sigma noise`. By diffusers' names of prediction
types, a model gives of it

- `epsilon`: the noise (DDPM, arXiv 2006.11239, section 3.2);
- `sample`: x_0;
- `v_prediction`: `v = signal noise - sigma x_0`, where `signal^2 + sigma^2 = 1` (Salimans and Ho 2022, arXiv
  2202.00512, appendix D);
- `flow_prediction`: `u = noise - x_0`, where `signal + sigma = 1`: straight paths (rectified flow, arXiv 2209.03003,
  section 2; with these signs Stable Diffusion 3, arXiv 2403.03206, section 3).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from diffusers_ext.core.seeds import check_diffusion_levels

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


class Level(NamedTuple):
    """Factors of x_0 and of noise in `x_t`; numbers, or tensors that broadcast with it."""

    signal: Any
    sigma: Any


def diffusion_level(alpha: torch.Tensor | float) -> Level:
    """The level of a scheduler's cumulative `alpha`: `x_t = sqrt(alpha) x_0 + sqrt(1 - alpha) noise`."""
    if isinstance(alpha, torch.Tensor):
        return Level(alpha.sqrt(), (1 - alpha).sqrt())
    # Rounded as IEEE has it, which PyTorch's square root in float64 is not everywhere.
    return Level(math.sqrt(alpha), math.sqrt(1 - alpha))


def scheduler_level(
    scheduler: Any, timesteps: torch.Tensor, x_t: torch.Tensor, *, flow_matching: bool = False
) -> Level:
    """Levels of `timesteps`, `(batch,)`, in the dtype of `x_t` and to be multiplied with it.

    With `flow_matching`, timesteps are `num_train_timesteps` times sigma, whatever shift the scheduler's grid has;
    without, the scheduler must have `alphas_cumprod`, and a timestep between two of its levels has the lower one.
    """
    if flow_matching:
        sigma = _like(timesteps.to(x_t) / scheduler.config.num_train_timesteps, x_t)
        return Level(1 - sigma, sigma)
    check_diffusion_levels(scheduler)
    return diffusion_level(_like(scheduler.alphas_cumprod.to(x_t)[timesteps.to(x_t.device).long()], x_t))


def _like(values: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (x_t.ndim - 1))


def predicted_of(x_0: torch.Tensor, noise: torch.Tensor, level: Level, prediction_type: str) -> torch.Tensor:
    """What a model should predict of `x_t = signal x_0 + sigma noise`: the target of training."""
    _check_type(prediction_type)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_0
    if prediction_type == "v_prediction":
        return level.signal * noise - level.sigma * x_0
    return noise - x_0


def predicted_x_0(output: torch.Tensor, x_t: torch.Tensor, level: Level, prediction_type: str) -> torch.Tensor:
    """The x_0 that a model's `output` at `x_t` means; not finite from `epsilon` of noise alone."""
    _check_type(prediction_type)
    signal, sigma = level
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / signal
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return signal * x_t - sigma * output
    return x_t - sigma * output


def predicted_noise(output: torch.Tensor, x_t: torch.Tensor, level: Level, prediction_type: str) -> torch.Tensor:
    """The noise that a model's `output` at `x_t` means; not finite from `sample` where there is none."""
    _check_type(prediction_type)
    signal, sigma = level
    if prediction_type == "epsilon":
        return output
    if prediction_type == "sample":
        return (x_t - signal * output) / sigma
    if prediction_type == "v_prediction":
        return sigma * x_t + signal * output
    return x_t + signal * output


def convert_prediction(
    output: torch.Tensor, x_t: torch.Tensor, level: Level, source: str, target: str
) -> torch.Tensor:
    """The same prediction as another type: `output` of the type `source` as one of the type `target`."""
    if source == target:
        return output
    meant = (predict(output, x_t, level, source) for predict in (predicted_x_0, predicted_noise))
    return predicted_of(*meant, level, target)


def step_factors(level: Level, to: Level, prediction_type: str) -> tuple[Any, Any]:
    """Factors of `x_t` and of the model's output in a step without new noise, `to.signal x_0 + to.sigma noise`.

    DDIM's (arXiv 2010.02502, equation 12, sigma = 0); Euler's on straight paths.

    Raises:
        ValueError: `epsilon` where the first level has no signal.
    """
    _check_type(prediction_type)
    signal, sigma = level
    if prediction_type == "flow_prediction":
        return 1.0, to.sigma - sigma
    if prediction_type == "v_prediction":
        return signal * to.signal + sigma * to.sigma, to.sigma * signal - to.signal * sigma
    if prediction_type == "sample":
        return to.sigma / sigma, to.signal - to.sigma * signal / sigma
    if signal == 0:
        raise ValueError(
            "`prediction_type` must be 'v_prediction' where the first level has no signal, got "
            "'epsilon': noise of which nothing else is known cannot be stepped."
        )
    return to.signal / signal, to.sigma - to.signal * sigma / signal


def _check_type(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` must be one of {list(PREDICTION_TYPES)}, got {prediction_type!r}.")
