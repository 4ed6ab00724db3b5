"""Pictures beside a tree of npy files: attention at every timestep and layer, and what its matrices are.

`visualizations/timestep_<number>/attention_<layer>.png`, and
`visualizations/covariance_summaries/covariance_statistics.png`; matplotlib is needed to draw them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from diffusers_ext.core.capture import natural_key
from diffusers_ext.core.text_files import read_json
from diffusers_ext.nullspace.plots import (
    AttentionMaps,
    attention_limit,
    finish_figure,
    new_figure,
    relative_attention,
    relative_ticks,
    short_key,
    shown_words,
)
from diffusers_ext.nullspace.projector import null_dimensions
from diffusers_ext.nullspace.slots import linear_name
from diffusers_ext.nullspace.statistics import FeatureStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_STEP_FOLDER = re.compile(r"(?:timestep|step)_(\d+)")
_FLAT_FILE = re.compile(r"((?:timestep|alpha_\d+)_(\d+))_(\w+)_cov\.npy")


class MatrixFile(NamedTuple):
    """One matrix of a tree."""

    path: Path
    metadata_path: Path
    step: str  # as the tree names it
    timestep: int
    layer_folder: str  # the layer's name with `.` replaced by `_`, perhaps after `module_`
    slot: str


def safe_name(layer: str) -> str:
    """A layer's dotted name as a folder name; not invertible."""
    return re.sub(r"[./]", "_", layer)


def find_run(folder: Path) -> Path:
    """The folder itself, or the one `run_*` in it; raises `ValueError` where there are several."""
    if not folder.is_dir():
        raise ValueError(f"`directory` must be a folder, got {folder}.")
    runs = sorted(path for path in folder.glob("run_*") if path.is_dir())
    if len(runs) > 1:
        raise ValueError(f"`directory` must be or hold a single run, got {[p.name for p in runs]}.")
    return runs[0] if runs else folder


def find_files(run: Path) -> list[MatrixFile]:
    """All matrices of a run, sorted by path, in either of two forms.

    `{timestep,step}_<number>/<layer>/<slot>_covariance.npy`, or
    `covariance_matrices/<layer>/{timestep_<number>,alpha_<index>_<number>}_<slot>_cov.npy`. Links to other steps of
    the run are second names, not further matrices.
    """
    files = []
    for path in run.glob("*/*/*_covariance.npy"):
        step = path.parents[1]
        if (match := _STEP_FOLDER.fullmatch(step.name)) and not step.is_symlink():
            slot = path.name.removesuffix("_covariance.npy")
            metadata_path = path.with_name(f"{slot}_metadata.json")
            files.append(MatrixFile(path, metadata_path, match[0], int(match[1]), path.parts[-2], slot))
    for path in run.glob("covariance_matrices/*/*_cov.npy"):
        if match := _FLAT_FILE.fullmatch(path.name):
            step, timestep, slot = match.groups()
            metadata_path = path.with_name(f"{step}_{slot}_metadata.json")
            files.append(MatrixFile(path, metadata_path, step, int(timestep), path.parts[-2], slot))
    if not files:
        raise ValueError(
            f"{run} must hold timestep_*/<layer>/<slot>_covariance.npy or "
            "covariance_matrices/<layer>/timestep_*_<slot>_cov.npy, got neither."
        )
    return sorted(files)


def read_metadata(path: Path) -> dict[str, Any]:
    """Metadata of one matrix; raises `ValueError` where its sizes are not positive integers."""
    if not path.is_file():
        raise ValueError(f"{path} must stand beside its matrix, got no such file.")
    metadata = read_json(path)
    for name in ("n_samples", "feature_dim"):
        value = metadata.get(name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer in {path}, got {value!r}.")
    return metadata


def read_matrix(path: Path, dim: int) -> torch.Tensor:
    """One matrix, `(dim, dim)` float64, made exactly symmetric."""
    with path.open("rb") as handle:
        try:
            matrix = np.lib.format.read_array(handle, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} must be a whole npy file of floats, got: {error}.") from error
    if matrix.shape != (dim, dim) or matrix.dtype.kind != "f":
        raise ValueError(
            f"{path} must hold {dim} x {dim} floats, as its metadata says, got {matrix.dtype} of shape {matrix.shape}."
        )
    matrix = matrix.astype(np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError(f"{path} must be finite, got infinite or not-a-number values.")
    if np.abs(matrix - matrix.T).max() > 1e-4 * np.abs(matrix).max():
        raise ValueError(f"{path} must be a symmetric matrix, got one that is not.")
    return torch.from_numpy((matrix + matrix.T) / 2)


def find_linear(file: MatrixFile, metadata: dict[str, Any], modules: dict[str, torch.nn.Module] | None) -> str:
    """Dotted name of the Linear whose inputs one file is about.

    Args:
        modules: `{dotted name: module}` of the denoiser, against which other trees are matched.
    """
    layer = metadata.get("layer")
    if layer is None and modules is None:
        raise ValueError(f"{file.metadata_path} must name its `layer`, got a folder name only. Pass `denoiser=`.")
    if layer is None:
        folder = file.layer_folder.removeprefix("module_")
        layers = [name for name in modules if name.endswith("attn2") and safe_name(name) == folder]
        if len(layers) != 1:
            raise ValueError(
                f"{file.path.parent} must be named after one cross-attention layer of `denoiser`, "
                f"got {len(layers)} such layers."
            )
        layer = layers[0]
    linear = linear_name(layer, file.slot)
    if modules is None:
        return linear
    if linear not in modules:
        raise ValueError(f"{file.path} must belong to a Linear of `denoiser`, got {linear!r}.")
    width, dim = modules[linear].in_features, metadata["feature_dim"]
    if dim != width:
        raise ValueError(
            f"{file.path} must be of the inputs of {linear} (width {width}), got width {dim}. "
            "Output features, often per head, lie on the other side of the weight and give no "
            "guarantee. Collect with `collect_statistics`."
        )
    return linear


SUMMARY_NAME = "covariance_summaries/covariance_statistics.png"

_TILE, _GAP, _WORD, _PROMPT = 64, 8, 15, 22  # pixels: of a map, between two, of words, of a prompt
_TOKENS = 12  # in a line
_PIXELS = 72.0  # of the canvas, an inch of the figure
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.2, 1.1, 0.55, 0.2  # inches around the maps
_SINGULAR = 1e16  # where condition numbers end


def draw_layer_attention(
    maps: Sequence[AttentionMaps], folder: str | os.PathLike, show_progress: bool = True
) -> list[Path]:
    """One picture for every kept timestep and layer; the colours of a layer mean the same in all of them.

    Args:
        maps: of several prompts, drawn below each other, with the same layers and timesteps.
        folder: gets `timestep_<number>/attention_<layer>.png`. A timestep that a scheduler visits twice is shown at
            its first visit.
    """
    layers, timesteps = list(maps[0].maps), maps[0].timesteps
    if any(list(one.maps) != layers or one.timesteps != timesteps for one in maps):
        raise ValueError("`maps` must have the same layers and timesteps, got different ones.")
    written = []
    visits = {timestep: timesteps.index(timestep) for timestep in timesteps}
    total = len(layers) * len(visits)
    with tqdm(total=total, desc="heat maps", disable=not show_progress) as bar:
        for layer in layers:
            limit = max(attention_limit(relative_attention(one.maps[layer])) for one in maps)
            for timestep, position in visits.items():
                name = f"timestep_{timestep:04d}/attention_{safe_name(layer)}.png"
                path = Path(folder, name)
                plot_layer_attention(maps, layer, position, path, limit=limit)
                written.append(path)
                bar.update()
    return written


def plot_layer_attention(
    maps: Sequence[AttentionMaps],
    layer: str,
    position: int = 0,
    path: str | os.PathLike | None = None,
    *,
    limit: float | None = None,
) -> Figure:
    """Heat maps of one layer at one timestep: a map per token, the prompts below each other.

    Above each map stands its token and the token's share of all attention; colours tell how much more or less than
    this share a position looks at it.

    Args:
        position: of the timestep among the kept ones.
        limit: ends of the colour scale, in powers of two; of this picture when `None`.
    """
    shown = [one.maps[layer][position : position + 1] for one in maps]
    contrasts = [relative_attention(mean) for mean in shown]
    limit = limit or max(map(attention_limit, contrasts))
    height, width = contrasts[0].shape[-2:]
    tile = (_TILE, round(_TILE * width / height))
    lines = [-(-len(one.tokens) // _TOKENS) for one in maps]
    line_height = _WORD + tile[0] + _GAP
    rows = sum(_PROMPT + count * line_height for count in lines)
    columns = max(6, *(min(len(one.tokens), _TOKENS) for one in maps)) + 1
    size = (columns * (tile[1] + _GAP), rows)
    figure = new_figure(size[0] / _PIXELS + _LEFT + _RIGHT, size[1] / _PIXELS + _TOP + _BOTTOM, layout="none")
    total_width, total_height = figure.get_size_inches()
    box = (_LEFT / total_width, _BOTTOM / total_height)
    axes = figure.add_axes((*box, size[0] / _PIXELS / total_width, size[1] / _PIXELS / total_height))
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
    axes.set_axis_off()
    top = 0
    for one, mean, contrast, count in zip(maps, shown, contrasts, lines):
        _draw_prompt(axes, one, mean[0].mean((1, 2)), contrast[0], tile, top, limit)
        top += _PROMPT + count * line_height
    title = f"{layer}, t = {maps[0].timesteps[position]}"
    figure.suptitle(title, x=box[0], y=1 - 0.12 / total_height, ha="left", va="top", fontsize=9)
    _draw_scale(figure, axes, limit)
    return finish_figure(figure, path)


def _draw_prompt(
    axes: Axes,
    one: AttentionMaps,
    shares: torch.Tensor,
    contrast: torch.Tensor,
    tile: tuple[int, int],
    top: int,
    limit: float,
) -> None:
    """A prompt from pixel row `top` on: its text, its picture, and a map per token."""
    plain = {"parse_math": False, "va": "bottom"}  # prompts may hold dollar signs
    words = shown_words(one)
    text = " ".join(word for word in words if word not in ("[start]", "[end]"))
    axes.text(0, top + _PROMPT - 5, f'"{text[:110]}"', fontsize=8, fontweight="bold", **plain)
    tiles = F.interpolate(contrast[None], tile, mode="nearest")[0].numpy()
    step = tile[1] + _GAP
    first = top + _PROMPT + _WORD
    axes.text(tile[1] / 2, first - 2, "picture", fontsize=7, ha="center", **plain)
    axes.imshow(one.image, extent=(0, tile[1], first + tile[0], first), aspect="auto")
    for index, word in enumerate(words):
        left = (index % _TOKENS + 1) * step
        upper = first + index // _TOKENS * (_WORD + tile[0] + _GAP)
        label = f"{word} {100 * shares[index]:.1f} %"
        axes.text(left + tile[1] / 2, upper - 2, label, fontsize=min(7.0, 7.0 * 15 / len(label)), ha="center", **plain)
        axes.imshow(
            tiles[index],
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            extent=(left, left + tile[1], upper + tile[0], upper),
            aspect="auto",
        )
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())


def _draw_scale(figure: Figure, axes: Axes, limit: float) -> None:
    width, height = figure.get_size_inches()
    length = min(height - _TOP - _BOTTOM, 2.5)
    place = (1 - (_RIGHT - 0.1) / width, 1 - (_TOP + length) / height, 0.12 / width, length / height)
    bar = figure.colorbar(axes.images[-1], cax=figure.add_axes(place))
    ticks, texts = relative_ticks(limit)
    bar.set_ticks(ticks, labels=texts, fontsize=7)
    bar.set_label("relative to the token's mean", fontsize=7)


def plot_covariance_statistics(
    statistics: FeatureStatistics, path: str | os.PathLike | None = None, threshold: float = 2e-2
) -> Figure:
    """What every matrix is: its rank, null dimensions, eigenvalues and condition number.

    Args:
        threshold: eigenvalues below this absolute value are null, as in the tree's projections.
    """
    keys = sorted(statistics.moments, key=natural_key)
    quality = statistics.validate()
    spectra = [statistics.spectrum(key).values.cpu() for key in keys]
    dims = [len(values) for values in spectra]
    figure = new_figure(14, 2.0 + 0.26 * len(keys))
    panels = figure.subplots(1, 4, sharey=True, width_ratios=(1, 1, 1.3, 1))
    _draw_counts(panels[0], [quality[key]["rank"] for key in keys], dims, "rank")
    nulls = [null_dimensions(values, threshold=threshold) for values in spectra]
    _draw_counts(panels[1], nulls, dims, f"null dimensions: eigenvalues below {threshold:g}")
    _draw_ranges(panels[2], spectra, [statistics.moments[key].floor for key in keys], threshold)
    _draw_conditions(panels[3], [quality[key]["condition_number"] for key in keys])
    panels[0].set_yticks(range(len(keys)), [short_key(statistics, key) for key in keys], fontsize=8)
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


def _draw_counts(axes: Axes, counts: Sequence[int], dims: Sequence[int], title: str) -> None:
    shares = [100 * count / dim for count, dim in zip(counts, dims)]
    bars = axes.barh(range(len(counts)), shares, 0.7, color="#3b6fb6")
    texts = [f"{count} of {dim}" for count, dim in zip(counts, dims)]
    axes.bar_label(bars, texts, padding=3, fontsize=7)
    axes.set(xlim=(0, 135), xticks=range(0, 101, 25))
    axes.set_xlabel("% of the width", fontsize=8)
    axes.set_title(title, fontsize=9)


def _draw_ranges(axes: Axes, spectra: Sequence[torch.Tensor], floors: Sequence[float], threshold: float) -> None:
    for row, (values, floor) in enumerate(zip(spectra, floors)):
        shown = values.clamp_min(floor * float(values[-1])).numpy()
        axes.plot(shown[[0, -1]], (row, row), color="0.7", linewidth=3, solid_capstyle="butt")
        axes.plot(np.quantile(shown, (0.25, 0.75)), (row, row), color="#3b6fb6", linewidth=6)
        axes.plot(np.median(shown), row, marker="|", color="black", markersize=8)
    axes.axvline(threshold, color="#b6403b", linestyle="--", label=f"threshold {threshold:g}")
    axes.set_xscale("log")
    axes.set_xlabel("smallest (numerical zero at least) to largest; half in blue, | median", fontsize=8)
    axes.set_title("eigenvalues", fontsize=9)
    axes.legend(fontsize=7, loc="upper left")


def _draw_conditions(axes: Axes, numbers: Sequence[float]) -> None:
    shown = np.minimum(numbers, _SINGULAR)
    colors = ["#3b6fb6" if number < 1e12 else "#b6403b" for number in numbers]
    bars = axes.barh(range(len(numbers)), shown, 0.7, color=colors)
    texts = [f"{number:.1e}" if number < _SINGULAR else "singular" for number in numbers]
    axes.bar_label(bars, texts, padding=3, fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(1, 1e21)
    axes.set_xlabel("red: 1e12 and above, with a true null space", fontsize=8)
    axes.set_title("condition number", fontsize=9)
