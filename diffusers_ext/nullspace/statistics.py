"""What a model already knows: second moments of the inputs of its Linears, with where they came from."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusers_ext.core.artifacts import Artifact, same_fingerprint
from diffusers_ext.core.capture import natural_key
from diffusers_ext.core.pipelines import denoiser_of, model_fingerprints
from diffusers_ext.core.second_moment import LowRankMoment, SecondMoment
from diffusers_ext.core.tensor_files import FLOATING
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.nullspace.prompts import unique
from diffusers_ext.nullspace.slots import check_widths, linear_name, split_linear_name

Moment = SecondMoment | LowRankMoment
# Of eigenvectors in float32, k of which are as far from orthonormal as their rounding adds up to.
_ORTHONORMAL = 1e-3
_ROUNDING = 1e-5  # of float32, as a share of the largest diagonal entry, and of it times the width


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
    return kinds, {name: tensor.cpu() for name, tensor in tensors.items()}


def check_config(config: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the config of statistics has its three parts, each of its form."""
    wanted = {"moments", "sources", "facts"}
    missing, surplus = sorted(wanted - config.keys()), sorted(config.keys() - wanted)
    if missing or surplus:
        raise ValueError(
            f"The config of statistics must hold {sorted(wanted)}, got {missing} missing and {surplus} that are "
            "unknown."
        )
    for name in ("moments", "sources", "facts"):
        if not isinstance(config[name], dict):
            raise ValueError(f"`{name}` must be an object, got {type(config[name]).__name__} in the config.")
    for linear, key in config["sources"].items():
        split_linear_name(linear)
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


def restore_moments(kinds: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Moment]:
    """The moments of `store_moments`; raises `ValueError` for those that are no second moments."""
    names: set[str] = set()
    for key, kind in kinds.items():
        _check_kind(key, kind)
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
    return moments


def _check_kind(key: str, kind: Any) -> None:
    names = set(kind) if isinstance(kind, dict) else None
    if names not in ({"count", "rest"}, {"count", "floor"}):
        raise ValueError(f"`moments.{key}` must hold `count`, and `floor` or `rest`, got {kind!r:.80}.")
    count = kind["count"]
    if type(count) is not int or not 0 < count < 2**63:
        raise ValueError(f"`moments.{key}.count` must be a positive integer, got {count!r}.")
    other, most, words = ("floor", 1.0, " to below 1") if "floor" in kind else ("rest", math.inf, "")
    if not _is_number(kind[other]) or not 0 <= kind[other] < most:
        raise ValueError(f"`moments.{key}.{other}` must be a number from 0{words}, got {kind[other]!r}.")


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
    if largest <= 0 or (total - total.T).abs().max().item() > _ROUNDING * largest:
        raise ValueError(f"{key!r} must be a symmetric matrix of squares, got one that is not.")
    # Cheaper than eigenvalues by far: a factor exists exactly where no eigenvalue is below the margin.
    margin = _ROUNDING * len(total) * largest
    shifted = total + margin * torch.eye(len(total), dtype=torch.float64)
    if torch.linalg.cholesky_ex(shifted).info.item():
        raise ValueError(f"{key!r} must have no negative eigenvalue, got one below {-margin:.3g}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


TEXT = "text"  # key of the one matrix that all cross-attention K and V share


class Spectrum(NamedTuple):
    """Eigendecomposition of one second moment, eigenvalues ascending."""

    values: torch.Tensor  # (dim,) float64, not negative
    vectors: torch.Tensor  # (dim, dim) float64, one eigenvector per column


class FeatureStatistics(Artifact):
    """Second moments of the inputs of a denoiser's Linears over a preserved set of prompts.

    Linears with the same input share one matrix: all cross-attention K and V read the text embeddings, so one `(width,
    width)` matrix serves them all.

    Args:
        sources: `{dotted name of a Linear: key of its moment}`.
        facts: where the numbers come from: `models` (fingerprints), `prompts`, `settings`.
    """

    # diffusers downloads no safetensors at all for a pipeline with a component of another file name.
    weights_name = "model.safetensors"

    def __init__(self, moments: dict[str, Moment], sources: dict[str, str], facts: dict[str, Any]) -> None:
        missing = sorted(set(sources.values()) - moments.keys())
        if missing:
            raise ValueError(f"`sources` must point at given moments, got unknown keys {missing}.")
        self.moments, self.sources, self.facts = moments, sources, facts
        self._spectra: dict[str, Spectrum] = {}

    @property
    def linears(self) -> list[str]:
        """Dotted names of the Linears that have a statistic, in natural order."""
        return sorted(self.sources, key=natural_key)

    @property
    def layers(self) -> list[str]:
        """Attention and feed-forward layers that have a statistic, in natural order."""
        return unique([split_linear_name(name)[0] for name in self.linears])

    @property
    def widths(self) -> dict[str, int]:
        """`{dotted name of a Linear: in_features}`."""
        return {linear: self.moments[key].dim for linear, key in self.sources.items()}

    def key(self, linear: str) -> str:
        """The key of the matrix of one Linear; raises `ValueError` where there is none."""
        if linear not in self.sources:
            raise ValueError(
                f"`statistics` must cover {linear!r}, got none for it (they cover {len(self.sources)} "
                f"Linears, the first is {next(iter(self.linears), None)!r}). Collect its feature too."
            )
        return self.sources[linear]

    def second_moment(self, layer: str, slot: str) -> torch.Tensor:
        """`C = E[x x^T]` of one Linear's inputs, `(dim, dim)` float64."""
        return self.moments[self.key(linear_name(layer, slot))].mean

    def spectrum(self, key: str) -> Spectrum:
        """Eigendecomposition of one matrix by its key, in float64, computed once."""
        if key not in self._spectra:
            values, vectors = torch.linalg.eigh(self.moments[key].mean)
            self._spectra[key] = Spectrum(values.clamp_min(0), vectors)
        return self._spectra[key]

    def merge(self, other: FeatureStatistics, times: int = 1) -> FeatureStatistics:
        """Add the statistics of further prompts, collected on the same model with the same settings.

        Args:
            times: count them as if seen this often; a few prompts that matter, such as those of other subjects, would
                else drown among many.
        """
        if times < 1:
            raise ValueError(f"`times` must be at least 1, got {times}.")
        self.check_same_models(other.facts["models"])
        if self.sources != other.sources:
            raise ValueError("`other` must cover the same Linears, got other features or layers.")
        if self.facts["settings"] != other.facts["settings"]:
            raise ValueError(
                f"`other` must be collected with the settings {self.facts['settings']}, got {other.facts['settings']}."
            )
        if any(isinstance(part, LowRankMoment) for part in (*self.moments.values(), *other.moments.values())):
            raise ValueError("Compressed statistics must not be merged: merge, then compress.")
        for key, moment in self.moments.items():
            moment.merge(other.moments[key].repeated(times))
        self.facts["prompts"] = unique(self.facts["prompts"] + other.facts["prompts"])
        self._spectra.clear()
        return self

    def all_reduce(self) -> FeatureStatistics:
        """Sum over processes, each of which has seen its own part of the prompts."""
        for moment in self.moments.values():
            moment.all_reduce()
        self._spectra.clear()
        return self

    def compress(self, energy: float = 0.999) -> FeatureStatistics:
        """A smaller copy: leading eigenvectors with the share `energy`, the rest spread evenly."""
        if not 0 < energy <= 1:
            raise ValueError(f"`energy` must be in (0, 1], got {energy}.")
        moments = {
            key: moment if isinstance(moment, LowRankMoment) else LowRankMoment.from_moment(moment, energy)
            for key, moment in self.moments.items()
        }
        return FeatureStatistics(moments, dict(self.sources), {**self.facts, "compressed_energy": energy})

    def validate(self) -> dict[str, dict[str, Any]]:
        """Raise `ValueError` for a matrix that is no second moment, and say how well the others are conditioned.

        Returns:
            `{key: {...}}`: `symmetric` (to 1e-5 of each entry), `positive_semidefinite` (no eigenvalue below -1e-8),
            `condition_number` (largest by smallest singular value; infinite where that is 0), `well_conditioned`
            (below 1e12) and `rank` (numerical, as in `report`). A matrix with a true null space, which the method
            wants, is not well conditioned.
        """
        return {key: _check_moment(key, moment) for key, moment in self.moments.items()}

    def check_same_models(self, models: dict[str, Any]) -> None:
        """Raise `ValueError` where one of `{name: fingerprint}` is not that of the model measured."""
        for name, expected in self.facts["models"].items():
            if name in models and not same_fingerprint(expected, models[name]):
                raise ValueError(
                    f"`statistics` must be of the same {name}, got another one (base model: "
                    f"{self.facts.get('base_model')!r}). Collect statistics for this model."
                )

    def check_pipeline(self, pipeline: Any) -> None:
        """Raise `ValueError` if the statistics were collected on another text encoder or denoiser."""
        self.check_same_models(model_fingerprints(pipeline, self.facts["models"]))
        check_widths(denoiser_of(pipeline), self.widths)

    def report(self) -> list[dict[str, Any]]:
        """One row per matrix: size, counts, numerical rank and how its energy is spread."""
        return [self._report_row(key) for key in sorted(self.moments, key=natural_key)]

    def _report_row(self, key: str) -> dict[str, Any]:
        moment, values = self.moments[key], self.spectrum(key).values.flip(0)
        share = torch.cumsum(values, 0) / values.sum()
        return {
            "matrix": key,
            "linears": sum(source == key for source in self.sources.values()),
            "dim": moment.dim,
            "vectors": moment.count,
            "trace": values.sum().item(),
            "rank": int((values > moment.floor * values[0]).sum()),
            "largest_share": share[0].item(),
            "dims_99": int((share < 0.99).sum()) + 1,
            "dims_99.9": int((share < 0.999).sum()) + 1,
        }

    def export_layout(self, directory: str | os.PathLike, **arguments: Any) -> Path:
        """Write a tree of npy files; see `diffusers_ext.nullspace.npy_tree.export_layout`."""
        from diffusers_ext.nullspace.npy_tree import export_layout

        return export_layout(self, directory, **arguments)

    @classmethod
    def from_layout(cls, directory: str | os.PathLike, **arguments: Any) -> FeatureStatistics:
        """Read a tree of npy files; see `diffusers_ext.nullspace.npy_tree.load_layout`."""
        from diffusers_ext.nullspace.npy_tree import load_layout

        return load_layout(directory, **arguments)

    def _card(self, *, token: str | None, **facts: Any) -> Callable[..., Card]:
        return statistics_card(self, token=token, **facts)

    def _to_artifact(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        kinds, tensors = store_moments(self.moments)
        return {"moments": kinds, "sources": self.sources, "facts": self.facts}, tensors

    @classmethod
    def _from_artifact(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> FeatureStatistics:
        check_config(config)
        moments = restore_moments(config["moments"], tensors)
        return cls(moments, config["sources"], config["facts"])


def _check_moment(key: str, moment: Moment) -> dict[str, Any]:
    moment.check_finite(key)
    if moment.count < 1:
        raise ValueError(f"`{key}` must rest on at least one vector, got {moment.count}.")
    matrix = moment.mean
    if not torch.isfinite(matrix).all():
        raise ValueError(f"`{key}` must be finite, got a matrix that is not.")
    largest = matrix.diagonal().max()
    if (matrix - matrix.T).abs().max() > _ROUNDING * largest:
        raise ValueError(f"`{key}` must be a symmetric matrix, got one that is not.")
    values = torch.linalg.eigvalsh(matrix)
    lowest = values[0].item()
    if lowest < -_ROUNDING * moment.dim * largest:
        raise ValueError(f"`{key}` must have no negative eigenvalue, got {lowest:.3g}.")
    sizes = values.abs()  # the singular values of a symmetric matrix
    condition_number = (sizes.max() / sizes.min()).item() if sizes.max() > 0 else float("inf")
    return {
        "symmetric": torch.allclose(matrix, matrix.T, rtol=1e-5),
        "positive_semidefinite": lowest >= -1e-8,
        "well_conditioned": condition_number < 1e12,
        "condition_number": condition_number,
        "rank": int((values > moment.floor * values[-1]).sum()),
    }


def statistics_card(
    statistics: FeatureStatistics,
    *,
    base_model: str | None = None,
    trained_on: str | None = None,
    settings: Mapping[str, Any] | None = None,
    pipeline: str | None = None,
    num_prompts: int | None = None,
    example_prompts: Sequence[str] | None = None,
    **common: Any,
) -> Callable[..., Card]:
    """The card of statistics but for the repository's name, as of `make_card`.

    What is `None` comes from the statistics themselves; what they do not know is a `ValueError`.
    """
    facts = statistics.facts
    prompts = facts["prompts"]
    num_prompts = num_prompts or len(prompts) or None
    if trained_on is None and num_prompts is not None:
        counted = "1 prompt" if num_prompts == 1 else f"{num_prompts} prompts"
        trained_on = f"What {len(statistics.linears)} linear layers read for {counted}."
    return make_card(
        "feature_statistics",
        base_model=base_model or facts.get("base_model") or None,
        trained_on=trained_on,
        settings=collection_settings(facts) if settings is None else settings,
        pipeline=pipeline or facts.get("pipeline"),
        num_prompts=num_prompts,
        example_prompts=list(example_prompts or prompts[:5]),
        layers=len(statistics.layers),
        megabytes=sum(tensor.nbytes for tensor in store_moments(statistics.moments)[1].values()) / 1e6,
        **common,
    )


def collection_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a collection that a card shows, each a single value."""
    settings = dict(facts["settings"])
    settings |= settings.pop("run", {})
    settings.pop("scheduler", None)  # many values; the artifact's config has them
    settings["compressed_energy"] = facts.get("compressed_energy")
    shown = {}
    for name, value in settings.items():
        value = ", ".join(map(str, value)) if isinstance(value, list) else value
        if value is not None and value != "" and not isinstance(value, dict):
            shown[name] = value
    return shown
