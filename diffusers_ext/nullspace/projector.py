"""Projectors onto what the preserved inputs do not use, and full-weight training inside of them.

A Linear keeps its outputs, `(W + D) x = W x` for every preserved input `x`, if and only if `D x = 0`, that is `D = D
P` with `P` the orthogonal projector on the null space of `C = E[x x^T]` (AlphaEdit, arXiv 2410.02355, for the form `D
P`). Rich prompt sets leave no exact null space; then the projector keeps the directions with the least energy, or
damps all of them smoothly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from diffusers_ext.core.capture import natural_key
from diffusers_ext.nullspace.slots import linear_name
from diffusers_ext.nullspace.statistics import FeatureStatistics, Spectrum


class Cut(NamedTuple):
    """The lower end of a spectrum that counts as null."""

    dimensions: int
    discarded_energy: float  # share of the trace that lies in it, hence is not protected


def null_dimensions(
    values: torch.Tensor,
    *,
    energy: float | None = None,
    rank: int | None = None,
    threshold: float | None = None,
    percentile: float | None = None,
    floor: float = 1e-12,
) -> int:
    """How many of the smallest eigenvalues count as null, by exactly one criterion.

    Args:
        values: `(dim,)` eigenvalues, ascending, not negative.
        energy: largest share of the trace that may be left unprotected; 0 keeps the numerical null space.
        threshold: eigenvalues below this absolute value of `C = E[x x^T]`.
        percentile: of the dimensions.
        floor: shares of the largest eigenvalue up to this are numerically zero.
    """
    criteria = {"energy": energy, "rank": rank, "threshold": threshold, "percentile": percentile}
    given = [name for name, value in criteria.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"Exactly one of {list(criteria)} must be given, got {given or 'none'}.")
    dim = values.shape[0]
    if energy is not None:
        if not 0 <= energy < 1:
            raise ValueError(f"`energy` must be in [0, 1), got {energy}.")
        share = torch.cumsum(values, 0) / values.sum()
        numerical = int((values <= floor * values[-1]).sum())
        return max(int((share <= energy).sum()), numerical)
    if rank is not None:
        if not 0 < rank <= dim:
            raise ValueError(f"`rank` must be from 1 to the width {dim}, got {rank}.")
        return int(rank)
    if threshold is not None:
        if threshold <= 0:
            raise ValueError(f"`threshold` must be positive, got {threshold}.")
        return int((values < threshold).sum())
    if not 0 < percentile <= 100:
        raise ValueError(f"`percentile` must be in (0, 100], got {percentile}.")
    return int(dim * percentile / 100)


def damped_projection(spectrum: Spectrum, damping: float) -> torch.Tensor:
    """`P = l (C + l I)^-1` with `l = damping * tr(C) / dim`: 1 on null directions, near 0 on used ones.

    The smaller the damping, the nearer to a hard null-space projector. `(dim, dim)` float64, symmetric.
    """
    if not 0 < damping < math.inf:
        raise ValueError(f"`damping` must be positive, got {damping}.")
    level = damping * spectrum.values.mean()
    return (spectrum.vectors * (level / (spectrum.values + level))) @ spectrum.vectors.T


def subject_projection(c_new: torch.Tensor, c_old: torch.Tensor, strictness: float, eps: float = 1e-4) -> torch.Tensor:
    """`P` of the update `D P` nearest to `D` on new inputs that is small on old ones, `(dim, dim)` float64.

    It minimises `E_new |(D' - D) x|^2 + s E_old |D' x|^2` over `D'`, whose solution is `D' = D P`, `P = C_new (C_new +
    s (C_old + eps tr(C_old)/d I))^-1`: ridge regression with the old second moment as its penalty. Unlike an
    orthogonal projector it need not be symmetric: what the subject shares with old inputs is replaced by what only the
    subject has.

    Args:
        strictness: `s`; 0 changes nothing on the subject, more leaves less on what is preserved.
        eps: price of directions that neither set uses, so that rounding in them counts for nothing.
    """
    if not 0 < strictness < math.inf:
        raise ValueError(f"`strictness` must be positive, got {strictness}.")
    level = eps * c_old.diagonal().mean()
    old = c_old + level * torch.eye(len(c_old), dtype=c_old.dtype, device=c_old.device)
    # C_new (C_new + s C_old)^-1 is the transpose of a solution, as both are symmetric.
    return torch.linalg.solve(c_new + strictness * old, c_new).T


class NullSpaceProjector:
    """Projects weight updates onto the null space of the preserved inputs, Linear by Linear.

    Args:
        projections: `{key: (dim, dim) float64}`, one per distinct matrix.
        bases: `{key: (dim, null dimensions)}` orthonormal columns; empty, as `cuts`, for a damped projector.
    """

    def __init__(
        self,
        projections: dict[str, torch.Tensor],
        sources: dict[str, str],
        bases: dict[str, torch.Tensor],
        cuts: dict[str, Cut],
    ) -> None:
        self._projections, self.sources, self._bases, self.cuts = projections, sources, bases, cuts

    @classmethod
    def from_statistics(
        cls,
        statistics: FeatureStatistics,
        *,
        energy: float | None = None,
        rank: int | None = None,
        threshold: float | None = None,
        percentile: float | None = None,
        damping: float | None = None,
    ) -> NullSpaceProjector:
        """Projectors by one criterion of `null_dimensions`, or `damping` (see `damped_projection`) without any."""
        criteria = {"energy": energy, "rank": rank, "threshold": threshold, "percentile": percentile}
        if damping is not None and any(value is not None for value in criteria.values()):
            raise ValueError("`damping` must be given alone, got another criterion with it.")
        projections, bases, cuts = {}, {}, {}
        for key in sorted(statistics.moments, key=natural_key):
            spectrum = statistics.spectrum(key)
            if damping is not None:
                projections[key] = damped_projection(spectrum, damping)
                continue
            count = null_dimensions(spectrum.values, **criteria, floor=statistics.moments[key].floor)
            if count == 0:
                raise ValueError(
                    f"The null space of {key!r} must have at least one dimension, got none of "
                    f"{spectrum.values.shape[0]} (smallest eigenvalue: "
                    f"{(spectrum.values[0] / spectrum.values.sum()).item():.2g} of the energy). "
                    "Raise the limit, preserve fewer prompts, or use `damping=` or generalized directions."
                )
            basis = spectrum.vectors[:, :count]
            share = (spectrum.values[:count].sum() / spectrum.values.sum()).item()
            bases[key], cuts[key], projections[key] = basis, Cut(count, share), basis @ basis.T
        return cls(projections, dict(statistics.sources), bases, cuts)

    def _key(self, linear: str) -> str:
        if linear not in self.sources:
            raise ValueError(f"The projector must cover {linear!r}, got none for it. Collect its feature too.")
        return self.sources[linear]

    def projection(self, linear: str) -> torch.Tensor:
        """`P` of one Linear by its dotted name, `(dim, dim)` float64."""
        return self._projections[self._key(linear)]

    def projections(self) -> dict[str, torch.Tensor]:
        """`{dotted name: P}` of every covered Linear; Linears with one input share a tensor."""
        return {linear: self._projections[key] for linear, key in self.sources.items()}

    def basis(self, layer: str, slot: str) -> torch.Tensor:
        """Orthonormal null basis of one Linear, `(dim, null dimensions)` float64."""
        return self.basis_of(linear_name(layer, slot))

    def basis_of(self, linear: str) -> torch.Tensor:
        """`basis` by a dotted name."""
        key = self._key(linear)
        if key not in self._bases:
            raise ValueError("`basis` must not be asked of a damped projector: it has no null space.")
        return self._bases[key]

    def project(self, delta: torch.Tensor, layer: str, slot: str) -> torch.Tensor:
        """`D P` for an update `D` of one Linear's weight, computed in float64, of the same dtype."""
        return project_rows(delta, self.projection(linear_name(layer, slot)))


def row_energies(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """`v C v^T` of each row `v`."""
    return ((rows @ moment) * rows).sum(1)


def project_rows(delta: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """`D P` of an update `(rows, dim)`, in float64, returned in its dtype."""
    if delta.shape[-1] != projection.shape[0]:
        raise ValueError(
            f"`delta` must have rows of width {projection.shape[0]} (the Linear's inputs), got shape "
            f"{tuple(delta.shape)}."
        )
    projection = projection.to(delta.device, torch.float64)
    return (delta.to(torch.float64) @ projection).to(delta.dtype)


class ProjectedUpdate:
    """After each step of `optimizer`, replaces every constrained weight's change by its projection.

    `W <- W_before + (W - W_before) P`. It is the update that is projected and never the gradient: Adam rescales
    element by element, which leads a projected gradient out of the null space again. Decoupled weight decay is part of
    the update, hence projected too; still, decay of the null part of a pretrained weight is silent drift, so
    optimizers with weight decay are refused.

    Use as a context manager, or call `remove()`.

    Args:
        optimizer: any torch optimizer, or accelerate's; steps that a gradient scaler skips are seen as skipped.
        projections: `{parameter: (in_features, in_features) P}` of every parameter that the optimizer trains: one
            without would drift freely.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, projections: Mapping[torch.nn.Parameter, torch.Tensor]
    ) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self._projections = dict(projections)
        self._check(optimizer)
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
                        f"A projected parameter must be a whole matrix with rows of width {projection.shape[0]}, got "
                        f"shape {shape}. Biases and sharded weights (FSDP, DeepSpeed ZeRO-3) cannot be projected."
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
