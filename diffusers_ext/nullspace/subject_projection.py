"""The projection that keeps what an update does on a subject and takes out what it does on the rest."""

from __future__ import annotations

import math

import torch

from diffusers_ext.nullspace.directions import check_new_subject
from diffusers_ext.nullspace.statistics import FeatureStatistics


# Price of directions that neither set uses, so that rounding in them counts for nothing.
_EPS = 1e-4


def subject_projection(
    c_new: torch.Tensor, c_old: torch.Tensor, strictness: float, eps: float = _EPS
) -> torch.Tensor:
    """`P` of the update `D P` nearest to `D` on new inputs that is small on old ones.

    It minimises `E_new |(D' - D) x|^2 + s E_old |D' x|^2` over `D'`, whose solution is `D' = D P`,
    `P = C_new (C_new + s (C_old + eps tr(C_old)/d I))^-1`: ridge regression with the old second moment
    as its penalty. Unlike an orthogonal projector it need not be symmetric: what the subject shares
    with old inputs is replaced by what only the subject has.

    Args:
        c_new, c_old: `(dim, dim)` float64 second moments of the subject and of what is preserved.
        strictness: `s`; 0 changes nothing on the subject, more leaves less on what is preserved.
        eps: regularisation, relative to the mean old energy per dimension.
    """
    if not 0 < strictness < math.inf:
        raise ValueError(f"`strictness` must be positive, got {strictness}.")
    level = eps * c_old.diagonal().mean()
    old = c_old + level * torch.eye(len(c_old), dtype=c_old.dtype, device=c_old.device)
    # C_new (C_new + s C_old)^-1 is the transpose of a solution, as both are symmetric.
    return torch.linalg.solve(c_new + strictness * old, c_new).T


def subject_projections(
    statistics: FeatureStatistics, instance_statistics: FeatureStatistics, strictness: float
) -> dict[str, torch.Tensor]:
    """`subject_projection` of every Linear that both statistics cover, by its dotted name."""
    check_new_subject(statistics, instance_statistics)
    projections: dict[tuple[str, str], torch.Tensor] = {}
    result = {}
    for linear, key in statistics.sources.items():
        keys = (key, instance_statistics.key(linear))
        if keys not in projections:
            old, new = statistics.moments[keys[0]].mean, instance_statistics.moments[keys[1]].mean
            projections[keys] = subject_projection(new.double(), old.double(), strictness)
        result[linear] = projections[keys]
    return result
