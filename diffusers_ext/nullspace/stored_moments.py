"""Second moments and their spectra on disk: config and tensors, and what those of strangers are checked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from diffusers_ext.core.second_moment import LowRankMoment, SecondMoment
from diffusers_ext.core.tensor_files import FLOATING

Moment = SecondMoment | LowRankMoment
# Of eigenvectors in float32, k of which are as far from orthonormal as their rounding adds up to.
_ORTHONORMAL = 1e-3
ROUNDING = 1e-5  # of float32, as a share of the largest diagonal entry, and of it times the width
# Of eigenpairs in float64, as a share of the largest eigenvalue and the width.
_EIGEN_ROUNDING = 1e-13
_PROBES = 4


class Spectrum(NamedTuple):
    """Eigendecomposition of one second moment, eigenvalues ascending."""

    values: torch.Tensor  # (dim,) float64, not negative
    vectors: torch.Tensor  # (dim, dim) float64, one eigenvector per column


def store_moments(moments: Mapping[str, Moment]) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """The config's part `moments`, and the tensors on the CPU."""
    tensors: dict[str, torch.Tensor] = {}
    kinds: dict[str, dict[str, Any]] = {}
    for key, moment in moments.items():
        if isinstance(moment, LowRankMoment):
            tensors[f"{key}.vectors"], tensors[f"{key}.values"] = moment.vectors, moment.values
            kinds[key] = {"count": moment.count, "rest": moment.rest}
        else:
            tensors[f"{key}.total"] = moment.total
            kinds[key] = {"count": moment.count, "floor": moment.floor}
            if moment.variance:
                kinds[key]["variance"] = moment.variance
    return kinds, {name: tensor.cpu() for name, tensor in tensors.items()}


def check_config(config: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the config of statistics has its three parts, each of its form, and no others.

    A fourth one, `spectra`, names the moments whose eigendecompositions are stored with them.
    """
    wanted = {"moments", "sources", "facts"}
    missing, surplus = sorted(wanted - config.keys()), sorted(config.keys() - wanted - {"spectra"})
    if missing or surplus:
        raise ValueError(
            f"The config of statistics must hold {sorted(wanted)}, got {missing} missing and {surplus} that are "
            "unknown."
        )
    for name in ("moments", "sources", "facts"):
        if not isinstance(config[name], dict):
            raise ValueError(f"`{name}` must be an object, got {type(config[name]).__name__} in the config.")
    spectra = config.get("spectra", [])
    if not isinstance(spectra, list) or any(
        not isinstance(key, str) or key not in config["moments"] for key in spectra
    ):
        raise ValueError(f"`spectra` must be a list of keys of moments, got {spectra!r:.80}.")
    for linear, key in config["sources"].items():
        if not linear.replace(".", "").isidentifier():
            raise ValueError(f"`sources` must hold dotted names of Linears, got {linear!r:.80}.")
        if not isinstance(key, str) or key not in config["moments"]:
            raise ValueError(f"`sources` must point at given moments, got {key!r} of {linear!r}.")
    facts = config["facts"]
    for name, kind in (("models", dict), ("prompts", list), ("settings", dict)):
        if not isinstance(facts.get(name, kind()), kind):
            raise ValueError(f"`facts.{name}` must be a {kind.__name__}, got {facts[name]!r:.80}.")
    strange = [prompt for prompt in facts.get("prompts", ()) if not isinstance(prompt, str)]
    if strange:
        raise ValueError(f"`facts.prompts` must be strings, got {strange[0]!r:.80}.")
    for name, found in facts.get("models", {}).items():
        probe = found.get("probe") if isinstance(found, dict) else None
        is_probe = isinstance(probe, list) and all(map(_is_number, probe))
        if not is_probe or not isinstance(found.get("architecture"), str):
            raise ValueError(
                f"`facts.models.{name}` must be a fingerprint, an architecture and a probe of "
                f"numbers, got {found!r:.80}."
            )


def restore_moments(
    kinds: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], least: int = 1
) -> dict[str, Moment]:
    """The moments of `store_moments`; raises `ValueError` for those that are no second moments.

    `least` is how many vectors each must have seen.
    """
    names: set[str] = set()
    for key, kind in kinds.items():
        _check_kind(key, kind, least)
        names |= {f"{key}.vectors", f"{key}.values"} if "rest" in kind else {f"{key}.total"}
    if names != tensors.keys():
        missing, surplus = sorted(names - tensors.keys()), sorted(tensors.keys() - names)
        raise ValueError(
            f"Statistics must hold the tensors of their config, got {missing[:3]} missing and "
            f"{surplus[:3]} that are unknown: their config was altered. Download or write them again."
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATING:
            raise ValueError(f"{name!r} must be of a floating dtype, got {tensor.dtype}.")
    moments: dict[str, Moment] = {}
    for key, kind in kinds.items():
        if "rest" in kind:
            vectors, values = tensors[f"{key}.vectors"], tensors[f"{key}.values"]
            _check_eigenvectors(key, vectors, values)
            moments[key] = LowRankMoment(vectors, values, kind["rest"], kind["count"])
        else:
            total = tensors[f"{key}.total"]
            _check_positive(key, total)
            moments[key] = SecondMoment.from_total(total, kind["count"], kind["floor"])
            moments[key].variance = float(kind.get("variance", 0.0))
    return moments


def _check_kind(key: str, kind: Any, least: int) -> None:
    names = set(kind) if isinstance(kind, dict) else None
    if names not in ({"count", "rest"}, {"count", "floor"}, {"count", "floor", "variance"}):
        raise ValueError(f"`moments.{key}` must hold `count`, and `floor` or `rest`, got {kind!r:.80}.")
    count = kind["count"]
    if type(count) is not int or not least <= count < 2**63:
        raise ValueError(f"`moments.{key}.count` must be an integer from {least}, got {count!r}.")
    other, most, words = ("floor", 1.0, " to below 1") if "floor" in kind else ("rest", math.inf, "")
    if not _is_number(kind[other]) or not 0 <= kind[other] < most:
        raise ValueError(f"`moments.{key}.{other}` must be a number from 0{words}, got {kind[other]!r}.")
    if not _is_number(kind.get("variance", 0)) or kind.get("variance", 0) < 0:
        raise ValueError(f"`moments.{key}.variance` must be a number from 0, got {kind['variance']!r}.")


def _check_eigenvectors(key: str, vectors: torch.Tensor, values: torch.Tensor) -> None:
    if vectors.ndim != 2 or values.shape != vectors.shape[1:] or not 0 < len(values) <= len(vectors):
        raise ValueError(
            f"{key!r} must have eigenvectors (dim, k) and k eigenvalues, got {tuple(vectors.shape)} "
            f"and {tuple(values.shape)}."
        )
    if (values < 0).any():
        raise ValueError(f"{key!r} must have no negative eigenvalue, got {values.min().item():.3g}.")
    product = vectors.double().T @ vectors.double()
    error = (product - torch.eye(len(values), dtype=torch.float64)).abs().max().item()
    if error > _ORTHONORMAL:
        raise ValueError(f"{key!r} must have orthonormal eigenvectors, got an error of {error:.3g}.")


def _check_positive(key: str, total: torch.Tensor) -> None:
    if total.ndim != 2 or total.shape[0] != total.shape[1] or not total.numel():
        raise ValueError(f"{key!r} must be a square matrix, got the shape {tuple(total.shape)}.")
    total = total.double()
    largest = total.diagonal().max().item()
    if not total.any():
        return  # of inputs that were all zero
    if largest <= 0 or (total - total.T).abs().max().item() > ROUNDING * largest:
        raise ValueError(f"{key!r} must be a symmetric matrix of squares, got one that is not.")
    # Cheaper than eigenvalues by far: a factor exists exactly where no eigenvalue is below the margin.
    margin = ROUNDING * len(total) * largest
    shifted = total + margin * torch.eye(len(total), dtype=torch.float64)
    if torch.linalg.cholesky_ex(shifted).info.item():
        raise ValueError(f"{key!r} must have no negative eigenvalue, got one below {-margin:.3g}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def store_spectra(spectra: Mapping[str, Spectrum]) -> dict[str, torch.Tensor]:
    """The tensors of eigendecompositions, on the CPU."""
    return {
        f"{key}.eigen{part}": tensor.cpu()
        for key, spectrum in spectra.items()
        for part, tensor in spectrum._asdict().items()
    }


def take_spectra(keys: Sequence[str], tensors: dict[str, torch.Tensor]) -> dict[str, Spectrum]:
    """The eigendecompositions of `store_spectra`, taken out of `tensors`; raises `ValueError` where one is missing."""
    names = [f"{key}.eigen{part}" for key in keys for part in Spectrum._fields]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"Statistics must hold the tensors of their config, got {missing[:3]} missing.")
    return {key: Spectrum(*(tensors.pop(f"{key}.eigen{part}") for part in Spectrum._fields)) for key in keys}


def check_spectrum(key: str, spectrum: Spectrum, moment: Moment) -> None:
    """Raise `ValueError` where a stored eigendecomposition is not that of its moment.

    A few random vectors `x` tell, at the cost of a product with each: `V V^T x = x` and `V diag(values) V^T x = C x`.
    """
    values, vectors = spectrum
    dim = moment.dim
    if values.shape != (dim,) or vectors.shape != (dim, dim) or {values.dtype, vectors.dtype} != {torch.float64}:
        raise ValueError(
            f"{key!r} must have {dim} eigenvalues and eigenvectors in float64, got {tuple(values.shape)} and "
            f"{tuple(vectors.shape)} in {values.dtype} and {vectors.dtype}."
        )
    if (values < 0).any() or (values.diff() < 0).any():
        raise ValueError(f"{key!r} must have ascending eigenvalues from 0, got {values[:3].tolist()}.")
    probes = torch.randn(dim, _PROBES, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
    seen = vectors.T @ probes
    allowed = _EIGEN_ROUNDING * dim * probes.norm()
    turned = (vectors @ seen - probes).norm()
    off = (vectors @ (values[:, None] * seen) - moment.mean @ probes).norm()
    if turned > allowed or off > allowed * values[-1]:
        raise ValueError(
            f"{key!r} must have the eigendecomposition of its second moment, got one that differs by "
            f"{off / values[-1].clamp_min(torch.finfo(torch.float64).tiny):.3g} of its largest eigenvalue."
        )
