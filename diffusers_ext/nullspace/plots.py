"""Pictures of spectra, null dimensions and the quality of second moments; matplotlib is needed to draw them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusers_ext.core.capture import natural_key
from diffusers_ext.nullspace.projector import null_dimensions
from diffusers_ext.nullspace.prompts import unique
from diffusers_ext.nullspace.statistics import TEXT, FeatureStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOWEST = 1e-16  # shares of the spectrum below it are drawn on the lower edge
_LEGEND_ROWS = 24
_SINGULAR = 1e16  # where condition numbers end
_BLUE, _RED = "#3b6fb6", "#b6403b"


def plot_spectrum(
    statistics: FeatureStatistics, path: str | os.PathLike | None = None, keys: Sequence[str] | None = None
) -> Figure:
    """Eigenvalues of the second moments, as shares of the largest, on a logarithmic scale.

    Args:
        keys: of `statistics.moments`; all when `None`. Linears with the same input are one line.
    """
    known = sorted(statistics.moments, key=natural_key)
    unknown = sorted(set(keys or []) - set(known))
    chosen = known if keys is None else list(keys)
    if unknown or not chosen:
        raise ValueError(f"`keys` must be among {known}, got {unknown or 'none'}.")
    columns = -(-len(chosen) // _LEGEND_ROWS)
    figure = new_figure(7 + 2.6 * columns, 4.8)
    axes = figure.add_subplot()
    layers = unique([key.partition(".to_")[0] for key in chosen])
    colors = {**dict(zip(layers, _colors(len(layers)))), TEXT: "black"}
    for key in chosen:
        values = statistics.spectrum(key).values.flip(0).cpu()
        shares = (values / values[0]).clamp_min(_LOWEST)
        layer, _, slot = key.partition(".to_")
        style = {"color": colors[layer], "linestyle": "--" if slot == "out.0" else "-"}
        axes.plot(range(1, len(shares) + 1), shares, label=_short_key(statistics, key), **style)
    for floor in sorted({statistics.moments[key].floor for key in chosen}):
        axes.axhline(floor, color="0.4", linestyle=":", label=f"numerical zero ({floor:.0e})")
    axes.set_yscale("log")
    axes.set_ylim(_LOWEST, 2)
    axes.set_xlabel("eigenvalue, largest first")
    axes.set_ylabel("share of the largest eigenvalue")
    axes.set_title("Spectra of the preserved inputs")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, ncols=columns, frameon=False)
    return finish_figure(figure, path)


def plot_null_dimensions(
    statistics: FeatureStatistics,
    path: str | os.PathLike | None = None,
    energy: float | Sequence[float] = (0.0, 1e-4, 1e-2),
) -> Figure:
    """How many dimensions are null, matrix by matrix, for some discarded energies.

    Args:
        energy: share(s) of the energy that may be left unprotected; 0 is the numerical null space.
    """
    energies = [energy] if isinstance(energy, (int, float)) else list(energy)
    if not energies:
        raise ValueError("`energy` must hold at least one share, got none.")
    keys = sorted(statistics.moments, key=natural_key)
    spectra = [statistics.spectrum(key).values for key in keys]
    floors = [statistics.moments[key].floor for key in keys]
    thickness = 0.8 / len(energies)
    figure = new_figure(8.5, 1.8 + 0.22 * len(energies) * len(keys))
    axes = figure.add_subplot()
    for index, (limit, color) in enumerate(zip(energies, _colors(len(energies)))):
        counts = [null_dimensions(values, energy=limit, floor=floor) for values, floor in zip(spectra, floors)]
        rows = np.arange(len(keys)) - 0.4 + (index + 0.5) * thickness
        _draw_counts(axes, rows, counts, spectra, height=thickness, color=color, label=f"{limit:g}")
    axes.set_yticks(range(len(keys)), [_short_key(statistics, key) for key in keys], fontsize=8)
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.set_xlim(0, 115)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("null dimensions, % of the width")
    axes.set_title("Null dimensions")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", title="discarded\nenergy", fontsize=8, title_fontsize=8, frameon=False)
    return finish_figure(figure, path)


def plot_covariance_statistics(
    statistics: FeatureStatistics, path: str | os.PathLike | None = None, threshold: float = 2e-2
) -> Figure:
    """What every matrix is: its rank, null dimensions, eigenvalues and condition number.

    Args:
        threshold: eigenvalues below this absolute value are null, as in the projections of a tree of npy files.
    """
    keys = sorted(statistics.moments, key=natural_key)
    quality = statistics.validate()
    spectra = [statistics.spectrum(key).values.cpu() for key in keys]
    figure = new_figure(14, 2.0 + 0.26 * len(keys))
    panels = figure.subplots(1, 4, sharey=True, width_ratios=(1, 1, 1.3, 1))
    ranks = [quality[key]["rank"] for key in keys]
    nulls = [null_dimensions(values, threshold=threshold) for values in spectra]
    titles = ("rank", f"null dimensions: eigenvalues below {threshold:g}")
    for axes, counts, title in zip(panels, (ranks, nulls), titles):
        _draw_counts(axes, range(len(keys)), counts, spectra, height=0.7, color=_BLUE)
        axes.set(xlim=(0, 135), xticks=range(0, 101, 25))
        axes.set_xlabel("% of the width", fontsize=8)
        axes.set_title(title, fontsize=9)
    _draw_ranges(panels[2], spectra, [statistics.moments[key].floor for key in keys], threshold)
    _draw_conditions(panels[3], [quality[key]["condition_number"] for key in keys])
    panels[0].set_yticks(range(len(keys)), [_short_key(statistics, key) for key in keys], fontsize=8)
    panels[0].set_ylim(len(keys) - 0.4, -0.6)
    for axes in panels:
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.tick_params(axis="x", labelsize=8)
    vectors = sum(moment.count for moment in statistics.moments.values())
    figure.suptitle(
        f"Second moments of the preserved inputs, pooled over timesteps: {len(keys)} matrices from "
        f"{vectors:,} vectors",
        fontsize=10,
    )
    return finish_figure(figure, path)


def _draw_counts(
    axes: Axes, rows: Sequence[float], counts: Sequence[int], spectra: Sequence[torch.Tensor], **bar: Any
) -> None:
    """Bars of so many of the dimensions, in % of them."""
    shares = [100 * count / len(values) for count, values in zip(counts, spectra)]
    bars = axes.barh(rows, shares, **bar)
    texts = [f"{count} of {len(values)}" for count, values in zip(counts, spectra)]
    axes.bar_label(bars, texts, padding=3, fontsize=7)


def _draw_ranges(axes: Axes, spectra: Sequence[torch.Tensor], floors: Sequence[float], threshold: float) -> None:
    for row, (values, floor) in enumerate(zip(spectra, floors)):
        shown = values.clamp_min(floor * float(values[-1])).numpy()
        axes.plot(shown[[0, -1]], (row, row), color="0.7", linewidth=3, solid_capstyle="butt")
        axes.plot(np.quantile(shown, (0.25, 0.75)), (row, row), color=_BLUE, linewidth=6)
        axes.plot(np.median(shown), row, marker="|", color="black", markersize=8)
    axes.axvline(threshold, color=_RED, linestyle="--", label=f"threshold {threshold:g}")
    axes.set_xscale("log")
    axes.set_xlabel("smallest (numerical zero at least) to largest; half in blue, | median", fontsize=8)
    axes.set_title("eigenvalues", fontsize=9)
    axes.legend(fontsize=7, loc="upper left")


def _draw_conditions(axes: Axes, numbers: Sequence[float]) -> None:
    colors = [_BLUE if number < 1e12 else _RED for number in numbers]
    bars = axes.barh(range(len(numbers)), np.minimum(numbers, _SINGULAR), 0.7, color=colors)
    texts = [f"{number:.1e}" if number < _SINGULAR else "singular" for number in numbers]
    axes.bar_label(bars, texts, padding=3, fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(1, 1e21)
    axes.set_xlabel("red: 1e12 and above, with a true null space", fontsize=8)
    axes.set_title("condition number", fontsize=9)


def _short_key(statistics: FeatureStatistics, key: str) -> str:
    """A key, short enough for a legend, with the number of Linears behind it."""
    linears = sum(source == key for source in statistics.sources.values())
    for part in ("_blocks", "_block", ".attentions", ".transformer"):
        key = key.replace(part, "")
    key = key.replace(".to_out.0", ".out").replace(".to_", ".")
    return key if linears < 2 else f"{key} ({linears} Linears)"


def _colors(count: int) -> list[Any]:
    return list(_matplotlib().colormaps["viridis"](np.linspace(0.05, 0.85, count)))


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """A figure of so many inches that belongs to no window."""
    return _matplotlib().figure.Figure(figsize=(width, height), dpi=110, layout=layout)


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install diffusers_ext[plots]") from error
    return matplotlib


def finish_figure(figure: Figure, path: str | os.PathLike | None) -> Figure:
    """The figure, written to a file where one is named."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure
