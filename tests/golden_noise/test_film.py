from __future__ import annotations

import torch

from diffusers_ext.golden_noise.networks.sequence_rnn import FiLM


def test_it_starts_as_the_identity():
    features = torch.randn(2, 3, 4, 5)
    assert torch.equal(FiLM(6, 3)(features, torch.randn(2, 6)), features)


def test_it_scales_and_shifts_each_channel():
    film = FiLM(1, 2)
    with torch.no_grad():
        film.gamma_beta.weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    features, condition = torch.randn(2, 2, 3, 3), torch.tensor([[1.0], [-0.5]])
    found = film(features, condition)
    torch.testing.assert_close(found[0, 0], 2 * features[0, 0] + 3)
    torch.testing.assert_close(found[0, 1], 3 * features[0, 1] + 4)
    torch.testing.assert_close(found[1, 1], 0 * features[1, 1] - 2)
