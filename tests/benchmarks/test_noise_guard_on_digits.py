"""Shares of losses avoided and gain lost, with intervals by resampled prompts."""

from __future__ import annotations

import pytest
import torch

from benchmarks.noise_guard_on_digits import figures


def test_shares_and_intervals_are_those_of_resampled_prompts():
    generator = torch.Generator().manual_seed(0)
    alone = torch.randn(30, 5, dtype=torch.float64, generator=generator) + 1
    changed = torch.rand(30, 5, generator=generator) > 0.3
    found = figures(alone, changed)
    guarded = torch.where(changed, alone, 0.0)
    drawn = torch.randint(30, (2000, 30), generator=torch.Generator().manual_seed(0))
    counted = {"gain_lost": (alone, guarded), "losses_avoided": ((alone < 0).double(), (guarded < 0).double())}
    for name, (before, after) in counted.items():
        assert found[name] == pytest.approx(1 - (after.sum() / before.sum()).item())
        resampled = 1 - after[drawn].flatten(1).sum(1) / before[drawn].flatten(1).sum(1)
        ends = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        assert found[f"{name}_interval"] == pytest.approx(ends.tolist(), abs=1e-12)
        assert found[f"{name}_interval"][0] < found[name] < found[f"{name}_interval"][1]
    assert (found["pairs"], found["losing"][1]) == (150, (guarded < 0).double().mean().item())


def test_a_guard_that_leaves_nothing_loses_nothing_and_avoids_nothing():
    alone = torch.linspace(-1, 3, 40, dtype=torch.float64).view(8, 5)
    found = figures(alone, torch.ones(8, 5, dtype=torch.bool))
    assert (found["gain_lost"], found["losses_avoided"]) == (0, 0)
    assert found["win_rate_changed"] == found["win_rate"]
