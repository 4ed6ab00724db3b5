"""Pictures of spectra, null dimensions and attention maps; matplotlib is needed to draw them."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image

from diffusers_ext.core.capture import capture, natural_key
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.families.registry import denoisers_of, match_family
from diffusers_ext.nullspace.projector import null_dimensions
from diffusers_ext.nullspace.prompts import check_prompt_length, check_prompts, unique
from diffusers_ext.nullspace.slots import find_linears, linear_name, split_linear_name
from diffusers_ext.nullspace.statistics import TEXT, FeatureStatistics, denoiser_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class AttentionMaps(NamedTuple):
    """Cross-attention of one picture, averaged over heads."""

    tokens: list[str]  # of the prompt, from its start token to its end token
    timesteps: list[int]
    maps: dict[str, torch.Tensor]  # {layer: (timesteps, tokens, height, width) float32}
    image: Image.Image


@torch.no_grad()
def attention_maps(
    pipeline: DiffusionPipeline,
    prompt: str,
    *,
    layers: str | Sequence[int] = "all",
    steps: str | Sequence[int] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
) -> AttentionMaps:
    """Draw one picture and keep where its positions look in the prompt.

    `softmax(Q K^T / sqrt(head_dim))`, from the outputs of `to_q` and `to_k` as the attention gets them, for the
    conditional half of the batch. The picture is the one drawn without looking.

    Args:
        pipeline: with a `UNet2DConditionModel`; it is left as it was.
        layers: `"all"`, or indices of transformer blocks in natural order.
        steps: which of the scheduler's timesteps to keep, from 0; `"all"`, or five spread evenly when `None`.

    Raises:
        TypeError: another denoiser.
        ValueError: unknown layers or steps, fused projections, or a prompt that is too long.
    """
    denoiser = denoiser_of(pipeline)
    if match_family(denoiser, "nullspace") is None:
        raise TypeError(f"`pipeline` must have a {denoisers_of('nullspace')}, got {type(denoiser)}.")
    check_prompt_length(pipeline, check_prompts([prompt], "prompt"))
    linears = find_linears(denoiser, ("q", "k"), layers)
    steps = _choose_steps(pipeline.scheduler, num_inference_steps, steps)
    recorder = _AttentionRecorder(pipeline, prompt, steps)
    with quiet_run(pipeline), capture(denoiser, linears, recorder.read, side="output"):
        image = pipeline(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=recorder.end_step,
        ).images[0]
    maps = {layer: torch.stack(kept) for layer, kept in recorder.maps.items()}
    return AttentionMaps(recorder.tokens, recorder.timesteps, maps, image)


def _choose_steps(scheduler: SchedulerMixin, num_inference_steps: int, steps: str | Sequence[int] | None) -> list[int]:
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    last = len(scheduler.timesteps) - 1
    if steps is None:
        return spread_steps(last + 1)
    if isinstance(steps, str):
        if steps != "all":
            raise ValueError(f"`steps` must be 'all' or from 0 to {last}, got {steps!r}.")
        return list(range(last + 1))
    steps = sorted({int(step) for step in steps})
    if not steps or steps[0] < 0 or steps[-1] > last:
        raise ValueError(f"`steps` must be from 0 to {last}, got {steps}.")
    return steps


def spread_steps(count: int) -> list[int]:
    """Five of so many steps, spread evenly; all where there are fewer."""
    return sorted(set(torch.linspace(0, count - 1, 5).round().int().tolist()))


def at_steps(maps: AttentionMaps, steps: Sequence[int]) -> AttentionMaps:
    """The maps of some of the kept timesteps, by their positions."""
    timesteps = [maps.timesteps[step] for step in steps]
    chosen = {layer: kept[list(steps)] for layer, kept in maps.maps.items()}
    return maps._replace(timesteps=timesteps, maps=chosen)


class _AttentionRecorder:
    """Keeps the latest queries and keys of every layer and, after chosen steps, their attention."""

    def __init__(self, pipeline: DiffusionPipeline, prompt: str, steps: list[int]) -> None:
        self.denoiser, self.steps = denoiser_of(pipeline), steps
        ids = pipeline.tokenizer(prompt).input_ids
        self.tokens = [pipeline.tokenizer.decode([token]).strip() for token in ids]
        self.features: dict[str, torch.Tensor] = {}
        self.timesteps: list[int] = []
        self.maps: dict[str, list[torch.Tensor]] = {}

    def read(self, name: str, features: torch.Tensor) -> None:
        # Guidance puts the conditional half last.
        self.features[name] = features[-1:]

    def end_step(self, _: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if step in self.steps:
            self.timesteps.append(int(timestep))
            layers = {split_linear_name(name)[0]: None for name in self.features}
            for layer in layers:
                query = self.features[linear_name(layer, "q")]
                key = self.features[linear_name(layer, "k")]
                scores = attention_probabilities(self.denoiser.get_submodule(layer), query, key)
                size = map_size(tensors["latents"].shape[-2:], scores.shape[0])
                kept = scores[:, : len(self.tokens)].T.unflatten(1, size)
                self.maps.setdefault(layer, []).append(kept.cpu())
        return tensors


def attention_probabilities(attention: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Attention of image positions to text tokens, `(positions, tokens)` float32, averaged over heads.

    `query` is `(1, positions, dim)`, `key` `(1, tokens, dim)`; every row of the result sums to 1.
    """
    query, key = (attention.head_to_batch_dim(part.float()) for part in (query, key))
    return attention.get_attention_scores(query, key).mean(0)


def map_size(latent_size: Sequence[int], positions: int) -> tuple[int, int]:
    """Height and width of a layer with so many positions, for latents that are halved per level."""
    height, width = latent_size
    while height * width > positions:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != positions:
        raise ValueError(f"`positions` must be {latent_size} halved, got {positions}.")
    return height, width


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
