from __future__ import annotations

import math

import pytest
import torch

from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.losses import (
    PairLoss,
    SequenceLoss,
    change_figures,
    gaussian_nll,
    output_statistics_kl,
    relative_error,
    squared_error,
)
from diffusers_ext.golden_noise.networks.sequence_transformer import SequencePrediction
from diffusers_ext.golden_noise.text_cache import TextCache

CPU = torch.device("cpu")
CACHE = TextCache(["a", "b"], TextConditioning(torch.randn(2, 3, 5), attention_mask=torch.ones(2, 3)))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_figures_of_no_change_the_true_one_and_its_opposite():
    noise, change = draw(3, 4, 8, 8), 0.1 * draw(3, 4, 8, 6 + 2)
    target = noise + change
    for prediction, error, cosine in ((noise, 1, 0), (target, 0, 1), (noise - change, 4, -1)):
        figures = change_figures(prediction, target, noise)
        assert relative_error(figures).item() == pytest.approx(error, abs=1e-4)
        torch.testing.assert_close(figures.cosine, torch.full((3,), float(cosine)), atol=1e-4, rtol=0)


def test_the_relative_error_is_of_sums():
    noise = torch.zeros(2, 1, 1, 1)
    target = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    prediction = torch.tensor([0.0, 3.0]).view(2, 1, 1, 1)
    assert relative_error(change_figures(prediction, target, noise)).item() == pytest.approx(0.1)


def test_pairs_get_the_text_of_their_own_prompt():
    seen = []

    def network(noise, prompt_embeds, attention_mask=None):
        seen.append((prompt_embeds, attention_mask))
        return noise + 1

    batch = {
        "noise": torch.zeros(3, 1, 2, 2),
        "golden": torch.ones(3, 2, 1, 2, 2) * torch.tensor([9.0, 2.0]).view(1, 2, 1, 1, 1),
        "text": torch.tensor([1, 0, 1]),
    }
    losses = PairLoss(CACHE, CPU, masked=True)(network, batch, torch.Generator())
    assert losses["loss"].item() == 1
    assert losses["relative"].item() == 0.25
    embeds, mask = seen[0]
    assert torch.equal(embeds, CACHE.text.prompt_embeds[[1, 0, 1]])
    assert mask.shape == (3, 3)
    PairLoss(CACHE, CPU, masked=False)(network, batch, torch.Generator())
    assert seen[1][1] is None


def test_sequences_are_taught_from_true_states():
    golden, noise = draw(2, 3, 1, 4, 4), draw(2, 1, 4, 4)
    batch = {"noise": noise, "golden": golden, "text": torch.tensor([0, 1])}
    logvar = 0.3 * draw(2, 3, 1, 4, 5 - 1)
    seen = []

    def network(states, text_embed, attention_mask):
        seen.append(states)
        return SequencePrediction(states, logvar)

    losses = SequenceLoss(CACHE, CPU, kl_weight=0.5)(network, batch, torch.Generator())
    states = torch.cat([noise[:, None], golden[:, :2]], 1)
    assert torch.equal(seen[0], states)
    kl = output_statistics_kl(states, logvar)
    expected = gaussian_nll(states, logvar, golden) + 0.5 * kl
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(losses["kl"], kl)
    for name in ("first", "last"):
        assert losses[f"relative_{name}"].item() == pytest.approx(1)
        assert losses[f"cosine_{name}"].item() == 0


def test_pooled_text_must_be_there():
    batch = {"noise": draw(1, 1, 2, 2), "golden": draw(1, 2, 1, 2, 2), "text": torch.tensor([0])}
    with pytest.raises(ValueError, match="must have pooled embeddings, got none"):
        SequenceLoss(CACHE, CPU, pooled=True)(None, batch, torch.Generator())


def draw_double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_squared_error():
    mean, target = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0])
    assert squared_error(mean, target) == 4.5


def test_likelihood_is_that_of_torch_without_its_constant():
    mean, logvar, target = (draw_double(2, 3, 4, 8, 8, seed=seed) for seed in range(3))
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = -normal.log_prob(target).mean() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(gaussian_nll(mean, logvar, target), expected)


def test_likelihood_at_unit_variance_is_half_the_squared_error():
    mean, target = draw_double(2, 4), draw_double(2, 4, seed=1)
    found = gaussian_nll(mean, torch.zeros_like(mean), target)
    torch.testing.assert_close(found, 0.5 * squared_error(mean, target))


def test_the_best_variance_is_the_squared_error():
    mean, target = draw_double(2, 4), draw_double(2, 4, seed=1)
    logvar = (target - mean).square().log().requires_grad_()
    gradient = torch.autograd.grad(gaussian_nll(mean, logvar, target), logvar)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.3, 1.0), (0.0, 0.5), (-1.0, 2.0)])
def test_kl_is_that_of_torch_on_the_moments_of_each_output(shift, scale):
    noise = draw_double(2, 3, 4, 8, 8)
    dims = (2, 3, 4)
    centred = noise - noise.mean(dims, keepdim=True)
    noise = centred / centred.std(dims, correction=0, keepdim=True) * scale + shift
    unit = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(shift, scale), unit)
    torch.testing.assert_close(output_statistics_kl(noise).float(), expected)


def test_kl_does_not_ask_for_a_fresh_noise():
    noise = draw_double(4, 2, 4, 64, 64)
    certain = torch.full_like(noise, -8.0)
    assert output_statistics_kl(noise, certain) < 1e-3
    per_value = 0.5 * (certain.exp() + noise.square() - 1 - certain).mean()
    assert per_value > 3


def test_kl_counts_the_predicted_variance():
    noise = draw_double(4, 2, 4, 64, 64)
    logvar = torch.zeros_like(noise)
    fresh = output_statistics_kl(torch.zeros_like(noise), logvar)
    assert fresh.abs() < 1e-12
    assert output_statistics_kl(noise, logvar) == pytest.approx(0.5 * (1 - math.log(2)), abs=0.01)


def test_kl_is_per_output_and_has_a_gradient_towards_unit_moments():
    noise = draw_double(1, 1, 4, 16, 16)
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
