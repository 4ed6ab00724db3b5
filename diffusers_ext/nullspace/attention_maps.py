"""Where the positions of a picture look in its prompt: cross-attention kept along a run, and drawn as heat maps."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from tqdm.auto import tqdm

from diffusers_ext.core.capture import capture
from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.families import match_family
from diffusers_ext.nullspace.npy_tree import safe_name
from diffusers_ext.nullspace.plots import finish_figure, new_figure
from diffusers_ext.nullspace.prompts import check_prompt_length, check_prompts
from diffusers_ext.nullspace.slots import find_linears, linear_name, split_linear_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

_TILE = 64  # height in pixels of one map
_GAP, _LAYER_GAP = 4, 8  # pixels between two: means of all layers, and maps of one layer
_LEAST_CONTRAST = 0.5  # in powers of two; keeps even maps from showing their rounding
# Of the maps of one layer.
_WORD, _PROMPT = 15, 22  # heights in pixels of words, and of a prompt
_TOKENS = 12  # in a line
_PIXELS = 72.0  # of the canvas, an inch of the figure
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.2, 1.1, 0.55, 0.2  # inches around the maps


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
    """
    denoiser = denoiser_of(pipeline)
    family = match_family(denoiser, "nullspace")
    if family is None or family.flow_matching:
        raise TypeError(f"`pipeline` must have a UNet2DConditionModel, got {type(denoiser)}.")
    check_prompt_length(pipeline, check_prompts([prompt], "prompt"))
    linears = find_linears(denoiser, ("q", "k"), layers)
    recorder = _AttentionRecorder(pipeline, prompt, _choose_steps(pipeline.scheduler, num_inference_steps, steps))
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
    """`(positions, tokens)` float32, the mean over heads, of `(1, positions, dim)` and `(1, tokens, dim)`."""
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
    contrast = _relative_attention(mean)
    limit = _limit(contrast)
    # Tiles side by side, (rows, columns, height, width) to one picture, with gaps of not-a-number.
    tiles = F.interpolate(contrast, tile, mode="nearest")
    tiles = F.pad(tiles, (0, _GAP, 0, _GAP), value=float("nan"))
    mosaic = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:-_GAP, :-_GAP].numpy()
    shown = axes.imshow(mosaic, cmap="RdBu_r", vmin=-limit, vmax=limit)
    _label_tiles(axes, maps, tile, (100 * mean.mean((0, 2, 3))).tolist())
    _label_scale(figure.colorbar(shown, ax=axes, fraction=0.03, pad=0.02), limit, 8)
    return finish_figure(figure, path)


def mean_over_layers(maps: AttentionMaps) -> torch.Tensor:
    """The layers' mean at the size of the finest, `(timesteps, tokens, height, width)` float32."""
    size = max((layer.shape[-2:] for layer in maps.maps.values()), key=lambda size: size.numel())
    resized = [F.interpolate(layer, size, mode="bilinear") for layer in maps.maps.values()]
    return torch.stack(resized).mean(0)


def _shown_words(maps: AttentionMaps) -> list[str]:
    return [re.sub(r"^<\|(start|end)oftext\|>$", r"[\1]", token) for token in maps.tokens]


def _relative_attention(mean: torch.Tensor) -> torch.Tensor:
    """How much more a position looks at a token than others do, in powers of two, map by map."""
    return torch.log2((mean / mean.mean((2, 3), keepdim=True)).clamp_min(1e-6))


def _limit(contrast: torch.Tensor) -> float:
    """Ends of the colour scale, in powers of two."""
    return min(max(float(contrast.abs().max()), _LEAST_CONTRAST), 3.0)


def _label_scale(bar: Colorbar, limit: float, fontsize: int) -> None:
    ticks = [tick for tick in (-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3) if abs(tick) <= limit]
    bar.set_ticks(ticks, labels=[f"{2.0**tick:.2g} x" for tick in ticks], fontsize=fontsize)
    bar.set_label("relative to the token's mean", fontsize=fontsize)


def _label_tiles(axes: Axes, maps: AttentionMaps, tile: tuple[int, int], shares: list[float]) -> None:
    words = _shown_words(maps)
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
    limits = {layer: max(_limit(_relative_attention(one.maps[layer])) for one in maps) for layer in layers}
    pictures = [(layer, timestep) for layer in layers for timestep in dict.fromkeys(timesteps)]
    written = []
    for layer, timestep in tqdm(pictures, desc="heat maps", disable=not show_progress):
        path = Path(folder, f"timestep_{timestep:04d}", f"attention_{safe_name(layer)}.png")
        plot_layer_attention(maps, layer, timesteps.index(timestep), path, limit=limits[layer])
        written.append(path)
    return written


def plot_layer_attention(
    maps: Sequence[AttentionMaps],
    layer: str,
    position: int = 0,
    path: str | os.PathLike | None = None,
    *,
    limit: float | None = None,
) -> Figure:
    """Heat maps of one layer at one timestep, by its `position`: a map per token, the prompts below each other.

    Above each map stands its token and the token's share of all attention; colours tell how much more or less than
    this share a position looks at it, up to `limit` powers of two.
    """
    shown = [one.maps[layer][position : position + 1] for one in maps]
    limit = limit or max(_limit(_relative_attention(mean)) for mean in shown)
    height, width = shown[0].shape[-2:]
    tile = (_TILE, round(_TILE * width / height))
    heights = [_PROMPT + -(-len(one.tokens) // _TOKENS) * (_WORD + tile[0] + _LAYER_GAP) for one in maps]
    columns = max(6, *(min(len(one.tokens), _TOKENS) for one in maps)) + 1
    size = (columns * (tile[1] + _LAYER_GAP), sum(heights))
    figure = new_figure(size[0] / _PIXELS + _LEFT + _RIGHT, size[1] / _PIXELS + _TOP + _BOTTOM, layout="none")
    total_width, total_height = figure.get_size_inches()
    box = (_LEFT / total_width, _BOTTOM / total_height)
    axes = figure.add_axes((*box, size[0] / _PIXELS / total_width, size[1] / _PIXELS / total_height))
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
    axes.set_axis_off()
    for index, (one, mean) in enumerate(zip(maps, shown)):
        _draw_prompt(axes, one, mean, tile, sum(heights[:index]), limit)
    title = f"{layer}, t = {maps[0].timesteps[position]}"
    figure.suptitle(title, x=box[0], y=1 - 0.12 / total_height, ha="left", va="top", fontsize=9)
    length = min(total_height - _TOP - _BOTTOM, 2.5)
    place = (1 - (_RIGHT - 0.1) / total_width, 1 - (_TOP + length) / total_height)
    scale = figure.add_axes((*place, 0.12 / total_width, length / total_height))
    _label_scale(figure.colorbar(axes.images[-1], cax=scale), limit, 7)
    return finish_figure(figure, path)


def _draw_prompt(
    axes: Axes, one: AttentionMaps, mean: torch.Tensor, tile: tuple[int, int], top: int, limit: float
) -> None:
    """A prompt from pixel row `top` on: its text, its picture, and a map per token."""
    plain = {"parse_math": False, "va": "bottom"}  # prompts may hold dollar signs
    words = _shown_words(one)
    text = " ".join(word for word in words if word not in ("[start]", "[end]"))
    axes.text(0, top + _PROMPT - 5, f'"{text[:110]}"', fontsize=8, fontweight="bold", **plain)
    tiles = F.interpolate(_relative_attention(mean), tile, mode="nearest")[0].numpy()
    shares = mean[0].mean((1, 2))
    step = tile[1] + _LAYER_GAP
    first = top + _PROMPT + _WORD
    axes.text(tile[1] / 2, first - 2, "picture", fontsize=7, ha="center", **plain)
    axes.imshow(one.image, extent=(0, tile[1], first + tile[0], first), aspect="auto")
    for index, word in enumerate(words):
        left = (index % _TOKENS + 1) * step
        upper = first + index // _TOKENS * (_WORD + tile[0] + _LAYER_GAP)
        label = f"{word} {100 * shares[index]:.1f} %"
        axes.text(left + tile[1] / 2, upper - 2, label, fontsize=min(7.0, 7.0 * 15 / len(label)), ha="center", **plain)
        place = {"extent": (left, left + tile[1], upper + tile[0], upper), "aspect": "auto"}
        axes.imshow(tiles[index], cmap="RdBu_r", vmin=-limit, vmax=limit, **place)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
