"""Second moments as a config and tensors, and what both must hold before anything is made of them.

Whoever altered a folder on purpose gives it fitting checksums, too, so that what is read is looked at as such: sizes,
counts, symmetry, no negative eigenvalue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from diffusers_ext.core.second_moment import LowRankMoment, SecondMoment
from diffusers_ext.core.tensor_files import FLOATING
from diffusers_ext.nullspace.slots import split_linear_name

Moment = SecondMoment | LowRankMoment
# Of eigenvectors in float32, k of which are as far from orthonormal as their rounding adds up to.
_ORTHONORMAL = 1e-3
# Of the largest diagonal entry and the width: what `FeatureStatistics.validate` allows for rounding.
_ROUNDING = 1e-5


def store_moments(moments: Mapping[str, Moment]) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """The config's part `moments` and the tensors, on the CPU."""
    tensors: dict[str, torch.Tensor] = {}
    kinds: dict[str, dict[str, Any]] = {}
    for key, moment in moments.items():
        if isinstance(moment, LowRankMoment):
            tensors[f"{key}.vectors"], tensors[f"{key}.values"] = moment.vectors, moment.values
            kinds[key] = {"count": moment.count, "rest": moment.rest}
        else:
            tensors[f"{key}.total"] = moment.total
            kinds[key] = {"count": moment.count, "floor": moment.floor}
    return kinds, {name: tensor.cpu() for name, tensor in tensors.items()}


def check_config(config: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the config of statistics has its three parts, each of its form."""
    wanted = {"moments", "sources", "facts"}
    missing, surplus = sorted(wanted - config.keys()), sorted(config.keys() - wanted)
    if missing or surplus:
        raise ValueError(
            f"The config of statistics must hold {sorted(wanted)}, got {missing} missing and {surplus} "
            "that are unknown."
        )
    for name in ("moments", "sources", "facts"):
        if not isinstance(config[name], dict):
            raise ValueError(f"`{name}` must be an object, got {type(config[name]).__name__} in the config.")
    for linear, key in config["sources"].items():
        split_linear_name(linear)
        if not isinstance(key, str) or key not in config["moments"]:
            raise ValueError(f"`sources` must point at given moments, got {key!r} of {linear!r}.")
    _check_facts(config["facts"])


def _check_facts(facts: Mapping[str, Any]) -> None:
    for name, kind in (("models", dict), ("prompts", list), ("settings", dict)):
        if not isinstance(facts.get(name, kind()), kind):
            raise ValueError(f"`facts.{name}` must be a {kind.__name__}, got {facts[name]!r:.80}.")
    strange = [prompt for prompt in facts.get("prompts", ()) if not isinstance(prompt, str)]
    if strange:
        raise ValueError(f"`facts.prompts` must be strings, got {strange[0]!r:.80}.")
    for name, found in facts.get("models", {}).items():
        probe = found.get("probe") if isinstance(found, dict) else None
        if (
            not isinstance(probe, list)
            or not isinstance(found.get("architecture"), str)
            or not all(_is_number(value) for value in probe)
        ):
            raise ValueError(
                f"`facts.models.{name}` must be a fingerprint, an architecture and a probe of "
                f"numbers, got {found!r:.80}."
            )


def restore_moments(kinds: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Moment]:
    """The moments of `store_moments`; raises `ValueError` for those that are no second moments."""
    needed: dict[str, tuple[str, ...]] = {}
    for key, kind in kinds.items():
        _check_kind(key, kind)
        needed[key] = ("vectors", "values") if "rest" in kind else ("total",)
    names = {f"{key}.{part}" for key, parts in needed.items() for part in parts}
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
    return moments


def _check_kind(key: str, kind: Any) -> None:
    names = set(kind) if isinstance(kind, dict) else None
    if names not in ({"count", "rest"}, {"count", "floor"}):
        raise ValueError(f"`moments.{key}` must hold `count`, and `floor` or `rest`, got {kind!r:.80}.")
    count = kind["count"]
    if type(count) is not int or not 0 < count < 2**63:
        raise ValueError(f"`moments.{key}.count` must be a positive integer, got {count!r}.")
    (other,) = names - {"count"}
    most = 1.0 if other == "floor" else math.inf
    if not _is_number(kind[other]) or not 0 <= kind[other] < most:
        raise ValueError(
            f"`moments.{key}.{other}` must be a number from 0"
            f"{' to below 1' if other == 'floor' else ''}, got {kind[other]!r}."
        )


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
    """Raise `ValueError` unless a sum of `x x^T` is square, symmetric and, but for rounding, positive."""
    if total.ndim != 2 or total.shape[0] != total.shape[1] or not total.numel():
        raise ValueError(f"{key!r} must be a square matrix, got the shape {tuple(total.shape)}.")
    total = total.double()
    largest = total.diagonal().max().item()
    if not total.any():
        return  # of inputs that were all zero
    if largest <= 0 or (total - total.T).abs().max().item() > _ROUNDING * largest:
        raise ValueError(f"{key!r} must be a symmetric matrix of squares, got one that is not.")
    # Cheaper than eigenvalues by far: a factor exists exactly where no eigenvalue is below the margin.
    margin = _ROUNDING * len(total) * largest
    shifted = total + margin * torch.eye(len(total), dtype=torch.float64)
    if torch.linalg.cholesky_ex(shifted).info.item():
        raise ValueError(f"{key!r} must have no negative eigenvalue, got one below {-margin:.3g}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
