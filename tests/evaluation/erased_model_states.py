"""Whether a model is what it was: weights, gradients, modes, hooks and torch's random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Fail unless the model and torch's random state leave as they came."""
    before, random = state(model), torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def state(model: torch.nn.Module) -> dict[str, object]:
    modules = {
        name: (type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks),
               vars(m).get("bypassed"), vars(m).get("_active_adapter"))
        for name, m in model.named_modules()
    }  # fmt: skip
    parameters = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    return {"modules": modules, "parameters": parameters}
