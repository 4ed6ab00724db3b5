from __future__ import annotations

import pytest
import torch

from diffusers_ext.eraser.concept_attention import agreement_weights, attention_mass, head_correlations, standardize


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_mass_is_the_sum_of_the_softmax_over_the_chosen_text_tokens(chunk_size):
    query, key = random(2, 2, 3, 15, 8)
    tokens = torch.zeros(2, 5, dtype=torch.bool)
    tokens[0, [1, 4]] = tokens[1] = True
    mass = attention_mass(query, key, tokens, chunk_size=chunk_size)
    weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)[:, :, 5:]
    assert mass.shape == (2, 3, 10)
    torch.testing.assert_close(mass[0], weights[0, ..., 1] + weights[0, ..., 4])
    torch.testing.assert_close(mass[1], weights[1, ..., :5].sum(-1))


def test_standardised_maps_have_mean_0_and_deviation_1_and_constant_ones_are_0():
    maps = standardize(torch.stack([5 + 3 * random(20), torch.full((20,), 0.25)]))
    torch.testing.assert_close(maps[0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(maps[0].std(correction=0), torch.tensor(1.0))
    assert torch.equal(maps[1], torch.zeros(20))


def test_agreement_is_the_correlation_averaged_over_clips_without_negative_ones():
    maps, reference = random(2, 2, 3, 30), random(2, 30, seed=1)
    maps[:, 0, 0] = 2 * reference + 7
    maps[:, 1, 2] = -reference
    plain = torch.stack(
        [
            torch.stack([torch.corrcoef(torch.stack([h, r]))[0, 1] for h in m.flatten(0, 1)]).reshape(2, 3)
            for m, r in zip(maps, reference)
        ]
    ).mean(0)
    expected = plain.clamp(min=0)
    correlations = head_correlations(maps, reference)
    torch.testing.assert_close(correlations.mean(0), plain)
    weights = agreement_weights(correlations)
    torch.testing.assert_close(weights, expected / expected.sum())
    assert weights.argmax() == 0
    assert weights[1, 2] == 0


def test_bad_references_are_refused():
    maps = random(2, 1, 1, 5)
    with pytest.raises(ValueError, match=r"`reference` must be \(batch, video\) like `head_maps`"):
        head_correlations(maps, random(2, 6))
    with pytest.raises(ValueError, match="`correlations` must be above 0 for some head, got none"):
        agreement_weights(head_correlations(maps, -maps[:, 0, 0]))
