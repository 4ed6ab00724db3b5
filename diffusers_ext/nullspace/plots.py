"""Pictures of spectra, null dimensions and attention maps; matplotlib is needed to draw them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from diffusers_ext.core.capture import natural_key
from diffusers_ext.nullspace.attention_maps import AttentionMaps
from diffusers_ext.nullspace.projector import null_dimensions
from diffusers_ext.nullspace.prompts import unique
from diffusers_ext.nullspace.statistics import TEXT, FeatureStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_LOWEST = 1e-16  # of the spectrum plot: shares below it are drawn on the lower edge
_TILE, _GAP = 64, 4  # height in pixels of one attention map, and between two
_LEGEND_ROWS = 24
_LEAST_CONTRAST = 0.5  # in powers of two; keeps even maps from showing their rounding


def plot_spectrum(
    statistics: FeatureStatistics, path: str | os.PathLike | None = None, keys: Sequence[str] | None = None
) -> Figure:
    """Eigenvalues of the second moments, as shares of the largest, on a logarithmic scale.

    Args:
        statistics: what to show; Linears with the same input are one line.
        keys: keys of `statistics.moments`; all when `None`.
    """
    chosen = _check_keys(statistics, keys)
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
        axes.plot(range(1, len(shares) + 1), shares, label=short_key(statistics, key), **style)
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
    keys = _check_keys(statistics, None)
    thickness = 0.8 / len(energies)
    figure = new_figure(8.5, 1.8 + 0.22 * len(energies) * len(keys))
    axes = figure.add_subplot()
    for index, (limit, color) in enumerate(zip(energies, _colors(len(energies)))):
        spectra = [statistics.spectrum(key).values for key in keys]
        counts = [
            null_dimensions(values, energy=limit, floor=statistics.moments[key].floor)
            for key, values in zip(keys, spectra)
        ]
        shares = [100 * count / len(values) for count, values in zip(counts, spectra)]
        rows = np.arange(len(keys)) - 0.4 + (index + 0.5) * thickness
        bars = axes.barh(rows, shares, thickness, color=color, label=f"{limit:g}")
        texts = [f"{count} of {len(values)}" for count, values in zip(counts, spectra)]
        axes.bar_label(bars, texts, padding=3, fontsize=7)
    axes.set_yticks(range(len(keys)), [short_key(statistics, key) for key in keys], fontsize=8)
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.set_xlim(0, 115)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("null dimensions, % of the width")
    axes.set_title("Null dimensions")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", title="discarded\nenergy", fontsize=8, title_fontsize=8, frameon=False)
    return finish_figure(figure, path)


def plot_attention_maps(maps: AttentionMaps, path: str | os.PathLike | None = None) -> Figure:
    """Heat maps of cross-attention: a row per timestep, a column per token, the mean of all layers.

    Colours tell how much more or less than the token's mean a position looks at the token; below each token stands
    that mean, as a share of all attention.
    """
    mean = mean_over_layers(maps)
    steps, tokens, height, width = mean.shape
    tile = (_TILE, round(_TILE * width / height))
    columns = 0.85 * tokens * tile[1] / tile[0]
    figure = new_figure(3.4 + columns, 1.5 + 0.85 * steps)
    picture, axes = figure.subplots(1, 2, width_ratios=(1.6, columns))
    picture.imshow(maps.image)
    picture.set_title("picture", fontsize=9)
    picture.set_axis_off()
    contrast = relative_attention(mean)
    limit = attention_limit(contrast)
    # Tiles side by side, (rows, columns, height, width) to one picture, with gaps of not-a-number.
    tiles = F.interpolate(contrast, tile, mode="nearest")
    tiles = F.pad(tiles, (0, _GAP, 0, _GAP), value=float("nan"))
    mosaic = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:-_GAP, :-_GAP].numpy()
    shown = axes.imshow(mosaic, cmap="RdBu_r", vmin=-limit, vmax=limit)
    _label_tiles(axes, maps, tile, (100 * mean.mean((0, 2, 3))).tolist())
    ticks, texts = relative_ticks(limit)
    bar = figure.colorbar(shown, ax=axes, ticks=ticks, fraction=0.03, pad=0.02)
    bar.ax.set_yticklabels(texts, fontsize=8)
    bar.set_label("relative to the token's mean", fontsize=8)
    return finish_figure(figure, path)


def mean_over_layers(maps: AttentionMaps) -> torch.Tensor:
    """The layers' mean at the size of the finest, `(timesteps, tokens, height, width)` float32."""
    size = max((layer.shape[-2:] for layer in maps.maps.values()), key=lambda size: size.numel())
    resized = [F.interpolate(layer, size, mode="bilinear") for layer in maps.maps.values()]
    return torch.stack(resized).mean(0)


def shown_words(maps: AttentionMaps) -> list[str]:
    """The tokens as they stand in pictures."""
    return [re.sub(r"^<\|(start|end)oftext\|>$", r"[\1]", token) for token in maps.tokens]


def relative_attention(mean: torch.Tensor) -> torch.Tensor:
    """How much more a position looks at a token than others do, in powers of two, map by map."""
    return torch.log2((mean / mean.mean((2, 3), keepdim=True)).clamp_min(1e-6))


def attention_limit(contrast: torch.Tensor) -> float:
    """Ends of the colour scale, in powers of two."""
    return min(max(float(contrast.abs().max()), _LEAST_CONTRAST), 3.0)


def relative_ticks(limit: float) -> tuple[list[float], list[str]]:
    """Ticks of the colour scale, and their texts."""
    ticks = [tick for tick in (-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3) if abs(tick) <= limit]
    return ticks, [f"{2.0**tick:.2g} x" for tick in ticks]


def _label_tiles(axes: Axes, maps: AttentionMaps, tile: tuple[int, int], shares: list[float]) -> None:
    words = shown_words(maps)
    labels = [f"{word}\n{share:.1f} %" for word, share in zip(words, shares)]
    # Prompts may hold dollar signs, and long words.
    style = {"fontsize": 8, "parse_math": False}
    if max(map(len, words)) > 12:
        style |= {"rotation": 30, "ha": "right"}
    times = [f"t = {timestep}" for timestep in maps.timesteps]
    height, width = tile
    axes.set_xticks([width / 2 + (width + _GAP) * i for i in range(len(labels))], labels, **style)
    axes.set_yticks([height / 2 + (height + _GAP) * i for i in range(len(times))], times, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    layers = list(maps.maps)
    source = layers[0] if len(layers) == 1 else f"mean of {len(layers)} layers"
    axes.set_title(f"Cross-attention, {source}", fontsize=9)


def _check_keys(statistics: FeatureStatistics, keys: Sequence[str] | None) -> list[str]:
    known = sorted(statistics.moments, key=natural_key)
    unknown = sorted(set(keys or []) - set(known))
    if unknown or (keys is not None and not len(keys)) or not known:
        raise ValueError(f"`keys` must be among {known}, got {unknown or 'none'}.")
    return known if keys is None else list(keys)


def short_key(statistics: FeatureStatistics, key: str) -> str:
    """A key, short enough for a legend, with the number of Linears behind it."""
    linears = sum(source == key for source in statistics.sources.values())
    for long, short in (
        ("_blocks", ""),
        ("_block", ""),
        (".attentions", ""),
        (".transformer", ""),
        (".to_out.0", ".out"),
        (".to_", "."),
    ):
        key = key.replace(long, short)
    return key if linears < 2 else f"{key} ({linears} Linears)"


def _colors(count: int) -> list[Any]:
    return list(_matplotlib().colormaps["viridis"](np.linspace(0.05, 0.85, count)))


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """A figure of so many inches that belongs to no window."""
    figure_class = _matplotlib().figure.Figure
    return figure_class(figsize=(width, height), dpi=110, layout=layout)


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
