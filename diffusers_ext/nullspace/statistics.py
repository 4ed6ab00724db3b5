"""What a model already knows: second moments of the inputs of its Linears, with where they came from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.core.artifacts import Artifact, same_fingerprint
from diffusers_ext.core.capture import natural_key
from diffusers_ext.core.pipelines import denoiser_of, model_fingerprints
from diffusers_ext.core.second_moment import LowRankMoment
from diffusers_ext.core.text_files import read_json
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.nullspace.prompts import unique
from diffusers_ext.nullspace.slots import check_widths, layer_of, linear_name
from diffusers_ext.nullspace.stored_moments import (
    ROUNDING,
    Moment,
    Spectrum,
    check_config,
    check_spectrum,
    restore_moments,
    store_moments,
    store_spectra,
    take_spectra,
)

PART_CLASS = "FeatureStatisticsPart"  # of `parts`, on disk
TEXT = "text"  # key of the one matrix that all cross-attention K and V share
# Settings that tell which texts were read, not how.
_WHICH_TEXTS = ("expand_sub_phrases", "recombinations")


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
        self._stores_spectra = False

    @property
    def linears(self) -> list[str]:
        """Dotted names of the Linears that have a statistic, in natural order."""
        return sorted(self.sources, key=natural_key)

    @property
    def layers(self) -> list[str]:
        """Attention and feed-forward layers that have a statistic, in natural order."""
        return unique([layer_of(name) for name in self.linears])

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

    def store_spectra(self) -> FeatureStatistics:
        """Compute the eigendecomposition of every matrix now, and save them with the statistics.

        Whoever loads these has them at once; the file grows to twice its size. Statistics that change afterwards
        (`merge`, `all_reduce`) forget them.
        """
        for key in self.moments:
            self.spectrum(key)
        self._stores_spectra = True
        return self

    def _forget_spectra(self) -> None:
        self._spectra.clear()
        self._stores_spectra = False

    def merge(self, other: FeatureStatistics, times: int = 1) -> FeatureStatistics:
        """Add the statistics of further prompts, collected on the same model with the same settings.

        Which texts the prompts imply may differ.

        Args:
            times: count them as if seen this often; a few prompts that matter, such as those of other subjects, would
                else drown among many.
        """
        if times < 1:
            raise ValueError(f"`times` must be at least 1, got {times}.")
        self.check_same_models(other.facts["models"])
        if self.sources != other.sources:
            raise ValueError("`other` must cover the same Linears, got other features or layers.")
        own, others = (
            {name: value for name, value in facts["settings"].items() if name not in _WHICH_TEXTS}
            for facts in (self.facts, other.facts)
        )
        if own != others:
            raise ValueError(f"`other` must be collected with the settings {own}, got {others}.")
        if any(isinstance(part, LowRankMoment) for part in (*self.moments.values(), *other.moments.values())):
            raise ValueError("Compressed statistics must not be merged: merge, then compress.")
        for key, moment in self.moments.items():
            moment.merge(other.moments[key].repeated(times))
        self.facts["prompts"] = unique(self.facts["prompts"] + other.facts["prompts"])
        self._forget_spectra()
        return self

    def all_reduce(self) -> FeatureStatistics:
        """Sum over processes, each of which has seen its own part of the prompts."""
        for moment in self.moments.values():
            moment.all_reduce()
        self._forget_spectra()
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
        moment, spectrum = self.moments[key], self._spectra.get(key)
        # Eigenvalues alone take a fraction of the time.
        values = torch.linalg.eigvalsh(moment.mean).clamp_min(0) if spectrum is None else spectrum.values
        values = values.flip(0)
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
            **({"sampling_error": moment.sampling_error} if getattr(moment, "variance", 0) else {}),
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
        config = {"moments": kinds, "sources": self.sources, "facts": self.facts}
        if self._stores_spectra:
            config["spectra"] = sorted(self._spectra, key=natural_key)
            tensors |= store_spectra(self._spectra)
        return config, tensors

    @classmethod
    def _read(cls, config_path: Path, weights_path: Path) -> FeatureStatistics:
        if cls.__name__ != PART_CLASS and read_json(config_path).get("_class_name") == PART_CLASS:
            raise ValueError(
                f"{config_path} must describe a {cls.__name__}, got one part of it. Put all parts together by "
                "`diffusers-ext merge`."
            )
        return super()._read(config_path, weights_path)

    @classmethod
    def _from_artifact(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> FeatureStatistics:
        check_config(config)
        spectra = take_spectra(config.get("spectra", []), tensors)
        moments = restore_moments(config["moments"], tensors)
        for key, spectrum in spectra.items():
            check_spectrum(key, spectrum, moments[key])
        statistics = cls(moments, config["sources"], config["facts"])
        statistics._spectra, statistics._stores_spectra = spectra, bool(spectra)
        return statistics


def _check_moment(key: str, moment: Moment) -> dict[str, Any]:
    moment.check_finite(key)
    if moment.count < 1:
        raise ValueError(f"`{key}` must rest on at least one vector, got {moment.count}.")
    matrix = moment.mean
    if not torch.isfinite(matrix).all():
        raise ValueError(f"`{key}` must be finite, got a matrix that is not.")
    largest = matrix.diagonal().max()
    if (matrix - matrix.T).abs().max() > ROUNDING * largest:
        raise ValueError(f"`{key}` must be a symmetric matrix, got one that is not.")
    values = torch.linalg.eigvalsh(matrix)
    lowest = values[0].item()
    if lowest < -ROUNDING * moment.dim * largest:
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
        megabytes=sum(tensor.nbytes for tensor in statistics._to_artifact()[1].values()) / 1e6,
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
