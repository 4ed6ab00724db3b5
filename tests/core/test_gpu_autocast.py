from __future__ import annotations

import pytest
import torch

from diffusers_ext.core.tracing import gpu_autocast


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(torch.nn.LayerNorm(4), (2, 4)), (torch.nn.GroupNorm(2, 4), (2, 4, 3))],
    ids=["layer", "group"],
)
def test_norms_give_float32_and_products_half_precision(norm, shape):
    model = torch.nn.ModuleDict({"norm": norm, "linear": torch.nn.Linear(4, 4)}).bfloat16()
    with gpu_autocast(model, torch.bfloat16):
        features = model["norm"](torch.randn(shape).bfloat16())
        assert features.dtype == torch.float32
        assert model["linear"](torch.randn(2, 4)).dtype == torch.bfloat16
    torch.testing.assert_close(features.mean(), torch.tensor(0.0), atol=0.05, rtol=0)


def test_float32_is_left_alone():
    model = torch.nn.LayerNorm(4)
    with gpu_autocast(model, torch.float32):
        assert not torch.is_autocast_enabled("cpu")
    assert "forward" not in vars(model)
