"""Weights made by a rule from their names, as the parity fixtures were."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch


def fill(keys: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Tensors of a fixture's `keys`; each is compared with the `check` that the fixture gives."""
    filled = {key: _fill_one(key, entry) for key, entry in keys.items()}
    for key, entry in keys.items():
        check, values = entry.get("check"), filled[key].flatten()
        if check is not None:
            torch.testing.assert_close(values[0].item(), check["first"], atol=2e-6, rtol=0)
            torch.testing.assert_close(values[-1].item(), check["last"], atol=2e-6, rtol=0)
            room = 1e-4 + 1e-7 * values.numel()
            torch.testing.assert_close(values.double().sum().item(), check["sum"], atol=room, rtol=0)
    return filled


def _fill_one(key: str, entry: Mapping[str, Any]) -> torch.Tensor:
    shape, rule = entry["shape"], entry["rule"]
    if rule == "constant":
        return torch.full(shape, entry["value"])
    if rule == "zero":
        return torch.zeros(shape, dtype=torch.long)
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    scaled = normal * entry["scale"]
    plus = {"randn": scaled, "randn_plus_1": scaled + 1, "abs_randn_plus_1": scaled.abs() + 1}
    return plus[rule]
