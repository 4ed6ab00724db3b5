from __future__ import annotations

import pytest
import torch

from diffusers_ext.core.tracing import MemoryTrace, fake_tensors, fill_with_fake_tensors


def test_peak_and_live_bytes():
    with MemoryTrace() as trace:
        kept = torch.zeros(100)
        torch.ones(50).add_(1)
        kept.view(10, 10).t()
        assert trace.live == 400
    assert trace.peak == 600


def test_known_tensors_and_their_views_do_not_count():
    known = torch.zeros(10)
    with MemoryTrace([known]) as trace:
        known.view(2, 5).t()
        assert trace.peak == 0
        known[:2].clone()
    assert trace.peak == 8


def test_a_backward_pass_is_seen_and_nothing_is_allocated():
    with torch.device("meta"):
        module = torch.nn.Linear(10**6, 10**6)  # 4 TB
    with fake_tensors():
        fill_with_fake_tensors(module)
        with MemoryTrace(module.parameters()) as trace:
            module(torch.zeros(1, 10**6)).sum().backward()
    assert 4e12 <= trace.peak < 4.1e12  # the weight's gradient


def test_modules_with_data_are_refused():
    with pytest.raises(ValueError, match="`module` must be on the meta device"):
        fill_with_fake_tensors(torch.nn.Linear(2, 2))
