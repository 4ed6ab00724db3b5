"""Autocast as on a GPU, for models that have shapes and no data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn import functional


@contextmanager
def gpu_autocast(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Autocast on the CPU with what a GPU does besides: its norms compute in float32 and give float32.

    Only for a model that is thrown away: its norms stay so, for gradient checkpointing runs them again
    in the backward pass.
    """
    if dtype == torch.float32:
        yield
        return
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm):
            module.forward = partial(_float32_norm, module)
    with torch.autocast("cpu", dtype):
        yield


def _float32_norm(
    module: torch.nn.LayerNorm | torch.nn.GroupNorm, features: torch.Tensor
) -> torch.Tensor:
    affine = (None if p is None else p.float() for p in (module.weight, module.bias))
    if isinstance(module, torch.nn.GroupNorm):
        return functional.group_norm(features.float(), module.num_groups, *affine, module.eps)
    return functional.layer_norm(features.float(), module.normalized_shape, *affine, module.eps)
