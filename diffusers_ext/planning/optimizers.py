"""What `--optimizer` keeps of each weight, allocates in a step and leaves in a checkpoint.

AdamW and its fused form are torch's own. The others are stand-ins, with tensors of the same sizes and steps that
allocate as much, so that a plan needs neither their packages nor their devices: AdamW in 8 bits of bitsandbytes 0.50,
Prodigy of prodigyopt 1.1, Schedule-Free of schedulefree 1.4.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

_SMALLEST_8BIT = 4096  # elements of a weight; smaller ones have a state in float32
_BLOCK_8BIT = 256  # elements that share a scale
_EPSILON, _RATE, _DECAY = 1e-8, 1e-3, 0.999


def planned_optimizer(
    name: str, weights: Iterable[torch.nn.Parameter], *, weight_decay: float = 0.0, as_on_gpu: bool = True
) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer`, or what stands for it; on a GPU torch's AdamW works on all weights at once."""
    weights = list(weights)
    if name in ("adamw", "adamw_fused"):
        kernels = {"fused": True} if name == "adamw_fused" else {"foreach": as_on_gpu}
        return torch.optim.AdamW(weights, weight_decay=weight_decay, **kernels)
    return _STAND_INS[name](weights)


def state_bytes(weights: Iterable[torch.Tensor], name: str = "adamw") -> int:
    """What the optimizer keeps of `weights`, of whose sizes alone is read."""
    shaped = [torch.nn.Parameter(torch.empty_like(weight, device="meta")) for weight in weights]
    return _kept_bytes(_stepped(name, shaped)) if shaped else 0


def optimizer_bytes(trained: Iterable[torch.Tensor], name: str = "adamw") -> int:
    """Size of the file with the state of an optimizer: its tensors, and what the format adds to each."""
    trained = list(trained)
    if not trained:
        return 0
    counts = [_SMALLEST_8BIT if name == "adamw_8bit" and w.numel() >= _SMALLEST_8BIT else 1 for w in trained]
    small = _stepped(name, [torch.nn.Parameter(torch.zeros(count)) for count in counts])
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    return buffer.getbuffer().nbytes - _kept_bytes(small) + state_bytes(trained, name)


def _stepped(name: str, weights: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    # Fused AdamW keeps what AdamW does.
    optimizer = planned_optimizer("adamw" if name == "adamw_fused" else name, weights, as_on_gpu=False)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return optimizer


def _kept_bytes(optimizer: torch.optim.Optimizer) -> int:
    kept = [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor)]
    shared = {id(leaf): leaf for leaf in kept}.values()
    return sum(leaf.numel() * leaf.element_size() for leaf in shared)


class _StandIn(torch.optim.Optimizer):
    """Makes the state of a weight in the first step with a gradient of it."""

    def __init__(self, weights: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(weights, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        weights = [w for group in self.param_groups for w in group["params"] if w.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight].update(self._new_state(weight))
        self._update(weights)

    def _new_state(self, weight: torch.Tensor) -> dict[str, Any]:
        raise NotImplementedError

    def _update(self, weights: Sequence[torch.nn.Parameter]) -> None:
        raise NotImplementedError


class _AdamW8bit(_StandIn):
    """Both moments in a byte each, with a scale for every block; in float32 those of small weights."""

    def __init__(self, weights: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(weights)
        self._tables: list[torch.Tensor] = []  # of what a byte stands for, with and without a sign

    def _new_state(self, weight: torch.Tensor) -> dict[str, Any]:
        count = weight.numel()
        if count < _SMALLEST_8BIT:
            return {f"state{k}": torch.zeros_like(weight, dtype=torch.float32) for k in (1, 2)}
        self._tables = self._tables or [torch.zeros(256, device=weight.device) for _ in range(2)]
        blocks = math.ceil(count / _BLOCK_8BIT)
        state: dict[str, Any] = {}
        for k, table in enumerate(self._tables, 1):
            scales = torch.zeros(blocks, device=weight.device)
            state |= {f"state{k}": torch.zeros_like(weight, dtype=torch.uint8), f"qmap{k}": table}
            state[f"absmax{k}"] = scales
        return state

    def _update(self, weights: Sequence[torch.nn.Parameter]) -> None:
        for weight in weights:  # one kernel each
            for k in (1, 2):
                self.state[weight][f"state{k}"].add_(1)
            weight.add_(weight.grad, alpha=-_RATE)


class _Prodigy(_StandIn):
    """AdamW's moments, a sum of gradients and the weights of the start, by which it finds its rate.

    The package has no start of weights that begin at zero.
    """

    def _new_state(self, weight: torch.Tensor) -> dict[str, Any]:
        moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        return {"s": torch.zeros_like(weight.flatten()), "p0": weight.flatten().detach().clone(), **moments}

    def _update(self, weights: Sequence[torch.nn.Parameter]) -> None:
        for weight in weights:
            state, gradient = self.state[weight], weight.grad
            torch.dot(gradient.flatten(), state["p0"] - weight.flatten())
            state["exp_avg"].lerp_(gradient, 0.1)
            state["exp_avg_sq"].mul_(_DECAY).addcmul_(gradient, gradient)
            state["s"].mul_(_DECAY).add_(gradient.flatten())
            state["s"].abs().sum()
        for weight in weights:
            state = self.state[weight]
            divisor = state["exp_avg_sq"].sqrt().add_(_EPSILON)  # there until the next weight's is made
            weight.addcdiv_(state["exp_avg"], divisor, value=-_RATE)


class _ScheduleFree(_StandIn):
    """A second set of weights beside squared gradients; all weights at once, on every device."""

    def _new_state(self, weight: torch.Tensor) -> dict[str, Any]:
        return {"z": weight.detach().clone(), "exp_avg_sq": torch.zeros_like(weight)}

    def _update(self, weights: Sequence[torch.nn.Parameter]) -> None:
        gradients = [weight.grad for weight in weights]
        z, squares = ([self.state[weight][name] for weight in weights] for name in ("z", "exp_avg_sq"))
        torch._foreach_mul_(squares, _DECAY)
        torch._foreach_addcmul_(squares, gradients, gradients)
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_add_(divisors, _EPSILON)
        torch._foreach_div_(gradients, divisors)
        torch._foreach_lerp_(weights, z, weight=0.1)
        for moved in (weights, z):
            torch._foreach_add_(moved, gradients, alpha=-_RATE)


_STAND_INS: dict[str, type[_StandIn]] = {"adamw_8bit": _AdamW8bit, "prodigy": _Prodigy, "schedule_free": _ScheduleFree}
