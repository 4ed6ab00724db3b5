"""The projections of an eraser, and those of all active erasers of a layer fused into two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

KINDS = ("gelu", "linear")


class EraserProjection(nn.Linear):
    """A Linear that computes in the dtype of its input, whatever dtype its weights are kept in."""

    def forward(self, features: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """`scale * (W x + b)`, in the dtype of `features` (or of autocast)."""
        weight = self.weight.to(features.dtype)
        bias = None if self.bias is None else self.bias.to(features.dtype)
        if scale is not None:  # on the input, the narrow side of `up`
            features, bias = features * scale, None if bias is None else bias * scale
        return functional.linear(features, weight, bias)


class FusedErasers(NamedTuple):
    """Erasers of one kind as one bottleneck, scales within: `base + up(activation(down(x)))`.

    With `D = [down_1; down_2; ...]` stacked and `U = [s_1 up_1, s_2 up_2, ...]` side by side it is the sum of
    `s_a up_a(activation(down_a(x)))`, for the activation is elementwise.
    """

    kind: str
    active: str | list[str]  # of the layer, as are the scales
    scaling: Mapping[str, float]
    dtype: torch.dtype  # of the features
    device: torch.device
    parameters: Sequence[Mapping[str, nn.Parameter | None]]  # of the projections, as their modules hold them
    weights: list[tuple]  # `weights_state` of them
    down: torch.Tensor | None = None  # `None` where nothing is added
    down_bias: torch.Tensor | None = None
    up: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None

    def is_current(self, active: str | list[str], scaling: Mapping[str, float], features: torch.Tensor) -> bool:
        """Whether it is what the layer would fuse now, for such features."""
        return (
            self.active == active
            and self.scaling == scaling
            and self.dtype == features.dtype
            and self.device == features.device
            and self.weights == weights_state(self.parameters)
        )

    def add(self, base: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """`base` with what the erasers make of `features`, in the dtype of `base`; neither is changed."""
        if self.down is None:
            return base
        hidden = functional.linear(features, self.down, self.down_bias)
        if self.kind == "gelu":
            hidden = functional.gelu(hidden)
        added = functional.linear(hidden, self.up, self.up_bias)
        return added.add_(base) if added.dtype == base.dtype else base + added.to(base.dtype)


def weights_state(parameters: Sequence[Mapping[str, nn.Parameter | None]]) -> list[tuple]:
    """What changes when a weight is replaced, moved, cast or written to in place."""
    return [
        (id(p), p.data_ptr(), p.is_inference() or p._version)
        for held in parameters
        for p in held.values()
        if p is not None
    ]


def can_be_fused(projections: Sequence[nn.Module]) -> bool:
    """Whether weights are frozen and read as they are: training writes to them behind autograd's back (as EMA does),
    and offloading and layerwise casting bring them in hooks on their modules.
    """
    weights = [weight for projection in projections for weight in projection.parameters()]
    return not any(
        "forward" in vars(projection) or projection._forward_hooks or projection._forward_pre_hooks
        for projection in projections
    ) and not any(
        weight.requires_grad or weight.is_meta or weight.is_inference() or type(weight.data) is not torch.Tensor
        for weight in weights
    )


def fuse(
    kind: str,
    pairs: Sequence[tuple[nn.Linear, nn.Linear]],
    names: Sequence[str],
    active: str | list[str],
    scaling: Mapping[str, float],
    features: torch.Tensor,
) -> FusedErasers:
    """The pairs `(down, up)` as one, in the dtype of the features; erasers of scale 0 are left out."""
    parameters = [projection._parameters for pair in pairs for projection in pair]
    active = active if isinstance(active, str) else list(active)
    key = (kind, active, dict(scaling), features.dtype, features.device, parameters, weights_state(parameters))
    kept = [(*pair, scaling[name]) for pair, name in zip(pairs, names, strict=True) if scaling[name] != 0]
    if not kept:
        return FusedErasers(*key)
    # Never inference tensors, which autograd could not save.
    with torch.inference_mode(False), torch.no_grad():
        down = torch.cat([down.weight for down, _, _ in kept])
        up = torch.cat([up.weight * scale for _, up, scale in kept], dim=1)
        down_bias = up_bias = None
        if kind == "gelu":
            down_bias = torch.cat([down.bias for down, _, _ in kept]).to(features.dtype)
            up_bias = torch.stack([up.bias * scale for _, up, scale in kept]).sum(dim=0).to(features.dtype)
        down, up = down.to(features.dtype).contiguous(), up.to(features.dtype).contiguous()
    return FusedErasers(*key, down, down_bias, up, up_bias)
