"""Full-weight training under a null-space constraint: every optimizer step's update is projected."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from diffusers_ext.nullspace.projector import project_rows


class ProjectedUpdate:
    """After each step of `optimizer`, replaces every constrained weight's change by its projection.

    `W <- W_before + (W - W_before) P`. It is the update that is projected and never the gradient: Adam
    rescales element by element, which leads a projected gradient out of the null space again. Decoupled
    weight decay is part of the update, hence projected too; still, decay of the null part of a
    pretrained weight is silent drift, so optimizers with weight decay are refused.

    Use as a context manager, or call `remove()`.

    Args:
        optimizer: any torch optimizer (an accelerate one is unwrapped); steps that a gradient scaler
            skips are seen as skipped.
        projections: `{parameter: (in_features, in_features) P}`. Every parameter that the optimizer
            trains must be in it: one that is not would drift freely.

    Raises:
        ValueError: an unconstrained parameter, a parameter that is not a matrix, a wrong width, or
            weight decay.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        projections: Mapping[torch.nn.Parameter, torch.Tensor],
    ) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self._projections = dict(projections)
        self._check(optimizer)
        self._optimizer = optimizer
        self._before: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._project),
        ]

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            if group.get("weight_decay"):
                raise ValueError(
                    f"`weight_decay` must be 0 on full weights, got {group['weight_decay']}: it pulls "
                    "the pretrained weights themselves towards zero."
                )
            for parameter in group["params"]:
                shape = tuple(parameter.shape)
                projection = self._projections.get(parameter)
                if projection is None:
                    raise ValueError(
                        f"Every trained parameter must have a projector, got none for one of shape "
                        f"{shape}. Freeze it, or collect statistics for its input."
                    )
                if parameter.ndim != 2 or projection.shape != (shape[1], shape[1]):
                    raise ValueError(
                        f"A projected parameter must be a whole matrix with rows of width "
                        f"{projection.shape[0]}, got shape {shape}. Biases and sharded weights "
                        "(FSDP, DeepSpeed ZeRO-3) cannot be projected."
                    )
                if parameter.dtype not in (torch.float32, torch.float64):
                    raise ValueError(
                        f"A projected parameter must be in float32, got {parameter.dtype}, whose "
                        "rounding alone leaves the null space. Cast it to float32."
                    )

    def _remember(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._check(optimizer)  # groups may have been added or changed since
        self._before = [
            (parameter, parameter.detach().clone())
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    @torch.no_grad()
    def _project(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for parameter, before in self._before:
            if parameter.grad is None:  # a closure makes gradients only inside the step
                continue
            projection = self._projections[parameter]
            parameter.copy_(before + project_rows(parameter - before, projection))
        self._before.clear()

    def remove(self) -> None:
        """Leave the optimizer as it was; weights stay as trained."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before.clear()

    def __enter__(self) -> ProjectedUpdate:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
