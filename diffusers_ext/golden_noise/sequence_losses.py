"""What sequence networks are trained with: squared error, Gaussian likelihood, output statistics."""

from __future__ import annotations

import torch


def squared_error(mean: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error, `mean((y - mu)^2)`."""
    _check_same_shape("target", target, mean)
    return (target - mean).square().mean()


def gaussian_nll(mean: torch.Tensor, logvar: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of a diagonal Gaussian, without its constant.

    `mean(0.5 * ((y - mu)^2 * exp(-l) + l))`; at fixed mu its minimum is `l = log (y - mu)^2`.
    """
    _check_same_shape("target", target, mean)
    _check_same_shape("logvar", logvar, mean)
    return 0.5 * ((target - mean).square() * torch.exp(-logvar) + logvar).mean()


def output_statistics_kl(mean: torch.Tensor, logvar: torch.Tensor | None = None) -> torch.Tensor:
    """How far the values of each output noise, taken together, are from a unit Gaussian.

    `KL(N(m, v) || N(0, 1)) = 0.5 * (v + m^2 - 1 - log v)` per sample and step, averaged, with m the
    mean over all values of one output noise and v their variance; under a predicted variance the law
    of total variance gives `v = var(mu) + mean(exp(l))`. A noise close to white satisfies it however
    sure the network is of each value; the same term on every single value would ask for mu = 0 and
    variance 1, a fresh random noise.

    Returns:
        Scalar, not negative; 0 where every output has mean 0 and variance 1.
    """
    values = mean.flatten(2)
    centre = values.mean(2)
    variance = values.var(2, correction=0)
    if logvar is not None:
        _check_same_shape("logvar", logvar, mean)
        variance = variance + logvar.exp().flatten(2).mean(2)
    return 0.5 * (variance + centre.square() - 1 - variance.log()).mean()


def _check_same_shape(name: str, given: torch.Tensor, mean: torch.Tensor) -> None:
    if given.shape != mean.shape:
        raise ValueError(
            f"`{name}` must have the shape of `mean`, {tuple(mean.shape)}, got "
            f"{tuple(given.shape)}."
        )
