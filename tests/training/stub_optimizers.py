"""Optimizers that need no package beside torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class AveragedSGD(torch.optim.SGD):
    """Stands for Schedule-Free: `train()` puts in the weights that move, `eval()` their average over all steps."""

    def __init__(self, parameters: Iterable, lr: float, betas, weight_decay: float, eps: float, warmup_steps: int = 0):
        super().__init__(parameters, lr=lr)
        for group in self.param_groups:
            group |= {"averages": False, "steps": 0, "warmup_steps": warmup_steps}

    def _switch(self, averages: bool) -> None:
        for group in self.param_groups:
            if group["averages"] is averages:
                continue
            group["averages"] = averages
            for parameter in group["params"]:
                if other := self.state[parameter].get("other"):
                    shown = parameter.detach().clone()
                    parameter.data.copy_(other[0])
                    other[0].copy_(shown)

    def train(self) -> None:
        self._switch(False)

    def eval(self) -> None:
        self._switch(True)

    def step(self, closure=None) -> None:
        super().step(closure)
        for group in self.param_groups:
            assert not group["averages"], "train() comes first"
            group["steps"] += 1
            for parameter in group["params"]:
                other = self.state[parameter].setdefault("other", [parameter.detach().clone()])
                other[0].lerp_(parameter.detach(), 1 / group["steps"])
