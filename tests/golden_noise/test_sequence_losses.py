from __future__ import annotations

import math

import pytest
import torch

from diffusers_ext.golden_noise.networks.sequence import (
    gaussian_nll,
    output_statistics_kl,
    squared_error,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_squared_error():
    mean, target = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0])
    assert squared_error(mean, target) == 4.5


def test_likelihood_is_that_of_torch_without_its_constant():
    mean, logvar, target = (draw(2, 3, 4, 8, 8, seed=seed) for seed in range(3))
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = -normal.log_prob(target).mean() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(gaussian_nll(mean, logvar, target), expected)


def test_likelihood_at_unit_variance_is_half_the_squared_error():
    mean, target = draw(2, 4), draw(2, 4, seed=1)
    found = gaussian_nll(mean, torch.zeros_like(mean), target)
    torch.testing.assert_close(found, 0.5 * squared_error(mean, target))


def test_the_best_variance_is_the_squared_error():
    mean, target = draw(2, 4), draw(2, 4, seed=1)
    logvar = (target - mean).square().log().requires_grad_()
    gradient = torch.autograd.grad(gaussian_nll(mean, logvar, target), logvar)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.3, 1.0), (0.0, 0.5), (-1.0, 2.0)])
def test_kl_is_that_of_torch_on_the_moments_of_each_output(shift, scale):
    noise = draw(2, 3, 4, 8, 8)
    dims = (2, 3, 4)
    centred = noise - noise.mean(dims, keepdim=True)
    noise = centred / centred.std(dims, correction=0, keepdim=True) * scale + shift
    unit = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(shift, scale), unit)
    torch.testing.assert_close(output_statistics_kl(noise).float(), expected)


def test_kl_does_not_ask_for_a_fresh_noise():
    noise = draw(4, 2, 4, 64, 64)
    certain = torch.full_like(noise, -8.0)
    assert output_statistics_kl(noise, certain) < 1e-3
    per_value = 0.5 * (certain.exp() + noise.square() - 1 - certain).mean()
    assert per_value > 3


def test_kl_counts_the_predicted_variance():
    noise = draw(4, 2, 4, 64, 64)
    logvar = torch.zeros_like(noise)
    fresh = output_statistics_kl(torch.zeros_like(noise), logvar)
    assert fresh.abs() < 1e-12
    assert output_statistics_kl(noise, logvar) == pytest.approx(0.5 * (1 - math.log(2)), abs=0.01)


def test_kl_is_per_output_and_has_a_gradient_towards_unit_moments():
    noise = draw(1, 1, 4, 16, 16)
    pair = torch.cat([noise + 1, noise - 1])
    assert output_statistics_kl(pair) > 0.4
    grown = (1.5 * noise).requires_grad_()
    gradient = torch.autograd.grad(output_statistics_kl(grown), grown)[0]
    assert (gradient * grown).sum() > 0


def test_other_shapes_are_refused():
    mean = torch.zeros(2, 1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"`target` must have the shape of `mean`, \(2, 1, 4"):
        squared_error(mean, mean[:1])
    with pytest.raises(ValueError, match="`target` must have the shape of `mean`"):
        gaussian_nll(mean, mean, mean[:1])
    with pytest.raises(ValueError, match="`logvar` must have the shape of `mean`"):
        gaussian_nll(mean, mean[:1], mean)
    with pytest.raises(ValueError, match="`logvar` must have the shape of `mean`"):
        output_statistics_kl(mean, mean[:1])
