from __future__ import annotations

import pytest
import torch

from diffusers_ext.golden_noise.losses import PairLoss, SequenceLoss, change_figures, relative_error
from diffusers_ext.golden_noise.networks.sequence_transformer import (
    SequencePrediction,
    gaussian_nll,
    output_statistics_kl,
)
from diffusers_ext.golden_noise.text_cache import NetworkText, TextCache

CPU = torch.device("cpu")
CACHE = TextCache(["a", "b"], NetworkText(torch.randn(2, 3, 5), torch.ones(2, 3), None))


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
