"""Choose the input directions a LoRA may use: much energy of the new subject, little of old knowledge."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch

from diffusers_ext.nullspace.projector import NullSpaceProjector, null_dimensions, row_energies
from diffusers_ext.nullspace.prompts import sub_phrases
from diffusers_ext.nullspace.statistics import FeatureStatistics

logger = logging.getLogger(__name__)
# Directions that carry less of the subject per unit of old energy than this teach nothing new: an
# instance prompt made of preserved words alone gives ratios near 1.
_SMALLEST_RATIO = 1.5
# What the subject does not use at all is left with this share of its largest ratio by rounding.
_ROUNDING = 1e-10
# Widths from which only the few eigenvectors that are asked for are computed, if they are so few a part of it.
_WIDE, _FEW = 512, 16
# Of `leading_eigenpairs`: surplus vectors of a block, blocks from one look to the next, the largest angle it leaves.
_SURPLUS, _BLOCKS, _ANGLE = 12, 4, 1e-8
# Of `usual_null_space`.
_EXACT_FLOOR, _ENOUGH, _CUT = 1e-12, 1e-4, 1e-3


class NothingNew(ValueError):
    """What the subject reads is what is preserved."""


@dataclass(frozen=True)
class DirectionSet:
    """Directions for one matrix, scaled to unit energy of the new subject."""

    vectors: torch.Tensor  # (rank, dim) float64, the rows of the LoRA's frozen A; v C_new v^T = 1
    ratios: torch.Tensor  # (rank,) new energy per unit of (regularised) old energy, descending
    old_energy: torch.Tensor  # (rank,) v C_old v^T
    instance_share: float  # of the subject's whole energy, in their span
    angle: float = 0.0  # bound on the angle to the exact eigenvectors, where only a few were computed


class Eigenpairs(NamedTuple):
    """The largest eigenvalues of a symmetric matrix, descending, and their eigenvectors."""

    values: torch.Tensor  # (count,)
    vectors: torch.Tensor  # (dim, count)
    angle: float  # bound on the sine of the angle between their span and the exact one; 0 of a whole decomposition


def leading_eigenpairs(matrix: torch.Tensor, count: int) -> Eigenpairs:
    """The `count` largest eigenvalues of a symmetric float64 matrix and their eigenvectors.

    Few of a wide matrix come from a block Krylov space (Golub, Underwood: "The block Lanczos method", 1977), all
    others from a whole decomposition. That none larger was missed is proven each time: with the found ones taken out
    of it, `shift I - matrix` has a Cholesky factor for a shift between the last of them and the next; so their span
    is within `|residuals| / (last - shift)` of the exact one (Davis, Kahan 1970), 1e-8 at most, which is below
    float32's rounding. Where it is not, or the factor does not exist, the whole decomposition is computed.
    """
    if len(matrix) >= max(_WIDE, _FEW * count):
        found = _block_krylov(matrix, count)
        if found is not None:
            return found
        logger.info("The %d largest of %d eigenvalues lie too near to others; computing all.", count, len(matrix))
    values, vectors = torch.linalg.eigh(matrix)
    return Eigenpairs(values.flip(0)[:count], vectors.flip(1)[:, :count], 0.0)


def _block_krylov(matrix: torch.Tensor, count: int) -> Eigenpairs | None:
    """`leading_eigenpairs` from a growing Krylov space; `None` where half of the space does not do."""
    dim, size = len(matrix), count + _SURPLUS
    generator = torch.Generator().manual_seed(dim)
    block = torch.randn(size, dim, dtype=matrix.dtype, generator=generator).to(matrix.device)
    basis, image = block[:0], block[:0]  # vectors are rows: such products are twice as fast
    while len(basis) + _BLOCKS * size <= dim // 2:
        for _ in range(_BLOCKS):
            for _ in range(2):  # once leaves what rounding brings back
                block = torch.linalg.qr((block - (block @ basis.T) @ basis).T).Q.T.contiguous()
            basis, image = torch.cat([basis, block]), torch.cat([image, block @ matrix])
            block = image[-size:]
        inner = basis @ image.T
        ritz, coordinates = torch.linalg.eigh((inner + inner.T) / 2)
        ritz, coordinates = ritz.flip(0), coordinates.T.flip(0)[:count]
        values, vectors = ritz[:count], coordinates @ basis
        gap = (values[-1] - ritz[count]) / 2
        angle = (torch.linalg.matrix_norm(coordinates @ image - values[:, None] * vectors) / gap).item()
        if not 0 <= angle <= _ANGLE:
            continue
        rest = vectors.T @ (values[:, None] * vectors) - matrix
        rest.diagonal().add_(values[-1] - gap)
        if not torch.linalg.cholesky_ex(rest).info.item():
            return Eigenpairs(values, vectors.T, angle)
    return None


def generalized_directions(c_new: torch.Tensor, c_old: torch.Tensor, rank: int, eps: float) -> DirectionSet:
    """The top solutions of `C_new v = mu (C_old + eps tr(C_old)/d I) v`, of `(dim, dim)` float64 second moments.

    `mu` is the energy of the new subject per unit of old energy; `eps`, relative to the mean old energy per dimension,
    is the price of directions that the old set does not use at all, and keeps `v` from exploiting rounding.
    """
    dim = c_old.shape[0]
    if not 1 <= rank <= dim:
        raise ValueError(f"`rank` must be from 1 to the width {dim}, got {rank}.")
    if not eps > 0:
        raise ValueError(f"`eps` must be positive, got {eps}.")
    level = eps * c_old.diagonal().mean()
    if dim >= max(_WIDE, _FEW * rank):
        # C_old + level I = L L^T: mu are the eigenvalues of L^-1 C_new L^-T, v = L^-T u of its eigenvectors.
        raised = c_old.clone()
        raised.diagonal().add_(level)
        lower, info = torch.linalg.cholesky_ex(raised)
        if not info.item():
            half = torch.linalg.solve_triangular(lower, c_new, upper=False)
            found = leading_eigenpairs(torch.linalg.solve_triangular(lower, half.T, upper=False), rank)
            vectors = torch.linalg.solve_triangular(lower.T, found.vectors, upper=True)
            return _scaled(vectors.T, found.values, c_new, c_old, found.angle)
    values, vectors = torch.linalg.eigh(c_old)
    whitening = (vectors * (values.clamp_min(0) + level).rsqrt()) @ vectors.T
    ratios, whitened = torch.linalg.eigh(whitening @ c_new @ whitening)
    ratios, whitened = ratios.flip(0)[:rank], whitened.flip(1)[:, :rank]
    return _scaled((whitening @ whitened).T, ratios, c_new, c_old)


def null_directions(c_new: torch.Tensor, c_old: torch.Tensor, basis: torch.Tensor, rank: int) -> DirectionSet:
    """The directions inside a null basis `Q`, orthonormal columns, with the most energy of the subject.

    They are `Q u` with `u` the top eigenvectors of `Q^T C_new Q` (InfLoRA, arXiv 2404.00228).
    """
    if not 1 <= rank <= basis.shape[1]:
        raise ValueError(f"`rank` must be from 1 to the null dimension {basis.shape[1]}, got {rank}.")
    energies, coordinates, angle = leading_eigenpairs(basis.T @ c_new @ basis, rank)
    vectors = (basis @ coordinates).T
    level = torch.finfo(torch.float32).eps * c_old.diagonal().mean()
    ratios = energies / (row_energies(vectors, c_old) + level)
    return _scaled(vectors, ratios, c_new, c_old, angle)


def _scaled(
    vectors: torch.Tensor, ratios: torch.Tensor, c_new: torch.Tensor, c_old: torch.Tensor, angle: float = 0.0
) -> DirectionSet:
    if not ratios[0] > _SMALLEST_RATIO:
        raise NothingNew(
            "The instance prompt must have directions that the preserved prompts do not use, got at "
            f"most {ratios[0].item():.3g} times their energy. Use a rarer token in the instance prompt, "
            "take it out of the preserved prompts, or preserve fewer of them."
        )
    used = int((ratios > _ROUNDING * ratios[0]).sum())
    if used < len(ratios):
        raise ValueError(
            f"`rank` must be at most {used}, the directions that the instance prompts use, got {len(ratios)}."
        )
    vectors = vectors / row_energies(vectors, c_new).sqrt()[:, None]
    span = torch.linalg.qr(vectors.T).Q
    share = ((span.T @ c_new) * span.T).sum() / c_new.diagonal().sum()
    return DirectionSet(vectors, ratios, row_energies(vectors, c_old), share.item(), angle)


@dataclass(frozen=True)
class NullSpaceDirections:
    """Directions for every Linear that both statistics cover."""

    sets: dict[str, DirectionSet]
    sources: dict[str, str]
    kind: str  # "generalized" or "null"
    null_space: str = ""  # of null directions, in words; empty where the caller chose it

    def vectors(self, linear: str) -> torch.Tensor:
        """The rows of A for one Linear by its dotted name, `(rank, dim)` float64.

        The first has unit energy of the subject. Further generalised ones have the first's old energy: optimizers
        that normalise gradients step as far along every row, and would move most what is known along the last.
        """
        chosen = self.sets[self.sources[linear]]
        if self.kind != "generalized":
            return chosen.vectors
        return chosen.vectors * (chosen.ratios / chosen.ratios[0]).sqrt()[:, None]

    def report(self) -> list[dict[str, float | int | str]]:
        """One row per matrix: chosen rank, ratios, old energy per direction, share of the subject."""
        return [
            {
                "matrix": key,
                "linears": sum(source == key for source in self.sources.values()),
                "rank": chosen.vectors.shape[0],
                "largest_ratio": chosen.ratios[0].item(),
                "smallest_ratio": chosen.ratios[-1].item(),
                "old_energy": chosen.old_energy.sum().item(),
                "instance_share": chosen.instance_share,
                **({"largest_angle": chosen.angle} if chosen.angle else {}),
                **({"null_space": self.null_space} if self.null_space else {}),
            }
            for key, chosen in self.sets.items()
        ]


def null_space_directions(
    statistics: FeatureStatistics,
    instance_statistics: FeatureStatistics,
    rank: int,
    eps: float = 1e-4,
    *,
    projector: NullSpaceProjector | None = None,
    null_space: str = "",
) -> NullSpaceDirections:
    """Directions for a LoRA of every Linear that the statistics cover.

    Args:
        instance_statistics: of the instance prompts, same features and layers, no sub-phrases.
        projector: cut the directions hard to its null spaces in place of the generalised problem.

    Returns:
        Directions of all Linears of a UNet. Of a joint model, some of whose layers hardly read text, of those that
        have any; the others are left alone, and named in the log.
    """
    check_new_subject(statistics, instance_statistics)
    sets: dict[str, DirectionSet] = {}
    left: dict[str, NothingNew] = {}
    for linear, key in statistics.sources.items():
        if key in sets or key in left:
            continue
        c_old = statistics.moments[key].mean
        c_new = instance_statistics.moments[instance_statistics.key(linear)].mean.to(c_old.device)
        try:
            if projector is None:
                sets[key] = generalized_directions(c_new, c_old, rank, eps)
            else:
                sets[key] = null_directions(c_new, c_old, projector.basis_of(linear), rank)
        except NothingNew as error:
            if "scope" not in statistics.facts["settings"]:
                raise
            left[key] = error
    if not sets:
        raise next(iter(left.values()))
    if left:
        logger.warning("%d of %d matrices read nothing new and are left alone: %s.", len(left), len(sets), [*left])
    kind = "generalized" if projector is None else "null"
    sources = {linear: key for linear, key in statistics.sources.items() if key in sets}
    return NullSpaceDirections(sets, sources, kind, null_space)


def usual_null_space(
    statistics: FeatureStatistics, instance_statistics: FeatureStatistics, rank: int
) -> tuple[NullSpaceProjector, str]:
    """The numerical null space where it exists and holds enough of the subject, else the energy cut.

    Numerical: eigenvalues up to `SecondMoment.floor`, 1e-12 of the largest, and only of moments whose Gram matrices
    were computed in float64; below the floor of float32 ones nothing can be told from rounding. Enough: each of `rank`
    directions in it holds 1e-4 of the subject's energy. A direction is scaled to the subject's unit energy, which
    scales float32's rounding (6e-8) by at most 1e2, so that preserved outputs move by less than 1e-5. One matrix
    without such a space, and the cut is that of all.
    """
    for linear, key in statistics.sources.items():
        moment, spectrum = statistics.moments[key], statistics.spectrum(key)
        count = null_dimensions(spectrum.values, energy=0, floor=moment.floor)
        if moment.floor > _EXACT_FLOOR or count < rank:
            break
        c_new = instance_statistics.moments[instance_statistics.key(linear)].mean
        basis = spectrum.vectors[:, :count]
        inside = torch.linalg.eigvalsh(basis.T @ c_new.to(basis.device) @ basis)
        if inside[-rank] < _ENOUGH * c_new.diagonal().sum().to(basis.device):
            break
    else:
        projector = NullSpaceProjector.from_statistics(statistics, energy=0)
        return projector, "numerical null space, exact in float32"
    projector = NullSpaceProjector.from_statistics(statistics, energy=_CUT)
    return projector, f"least {_CUT:g} of the energy, approximate"


def check_new_subject(statistics: FeatureStatistics, instance_statistics: FeatureStatistics) -> None:
    """Raise `ValueError` unless the second are of the same model and Linears, and of a new subject."""
    statistics.check_same_models(instance_statistics.facts["models"])
    # Energies cannot tell: one prompt of a hundred has a hundredth of its energy in their mean.
    preserved = statistics.facts["prompts"]
    if statistics.facts["settings"].get("expand_sub_phrases"):
        preserved = sub_phrases(preserved)
    repeated = [p for p in instance_statistics.facts["prompts"] if p in preserved]
    if repeated:
        raise ValueError(
            f"An instance prompt must not be a preserved one or a part of it, got {repeated[0]!r}. "
            "Use a rare token in it, or take it out of the preserved prompts."
        )
    missing = sorted(statistics.sources.keys() ^ instance_statistics.sources.keys())
    if missing:
        raise ValueError(f"Both statistics must cover the same Linears, got a difference in {missing[:3]}.")
