"""One pipeline drawing with its erasers off, and with them at any scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffusers import DiffusionPipeline

from diffusers_ext.eraser.layer import EraserLayer
from diffusers_ext.eraser.outputs import eraser_layers
from diffusers_ext.evaluation.erasure_summary import ALL


def find_erasers(
    pipeline: DiffusionPipeline, adapter_name: str | Sequence[str] | None = None
) -> list[str]:
    """Names of the erasers to evaluate: the given ones, all active ones when `None`."""
    layers = eraser_layers(pipeline.transformer).values()
    loaded = list(dict.fromkeys(name for layer in layers for name in layer.eraser_down))
    active = [layer for layer in layers if not layer.disable_adapters]
    on = dict.fromkeys(name for layer in active for name in layer.active_adapters)
    names = [name for name in loaded if name in on]
    if adapter_name is not None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    unknown = [name for name in names if name not in loaded]
    if unknown or not names:
        raise ValueError(
            f"`adapter_name` must name erasers of the pipeline, {loaded}, got {unknown or names}. Load "
            "one with `load_eraser`, and switch it on."
        )
    return names


@contextmanager
def erasers_at_scale(
    pipeline: DiffusionPipeline, names: Sequence[str], scale: float
) -> Iterator[None]:
    """Only the named erasers on, each at its own scale times `scale`; all come back as they were."""
    layers = list(eraser_layers(pipeline.transformer).values())
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    scaled: list[EraserLayer] = []
    try:
        for layer in layers:
            layer._disable_adapters = False
            layer._active_adapter = [name for name in names if name in layer.eraser_down]
            layer.scale_layer(scale)
            scaled.append(layer)
        yield
    finally:
        for layer in scaled:
            layer.unscale_layer(scale)
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = state


def name_scales(scales: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """`{side: scale}`: `"erased"` for a single scale of 1, else `"scale 0.5"`, ..."""
    if not scales or len(set(scales)) < len(scales) or not all(map(math.isfinite, scales)):
        raise ValueError(f"`scales` must hold different finite numbers, got {list(scales)}.")
    if ALL in groups or "" in groups:
        raise ValueError(
            f"`groups` must not be named {ALL!r} or be without a name, got {list(groups)}."
        )
    if list(scales) == [1.0]:
        return {"erased": 1.0}
    return {f"scale {scale:g}": float(scale) for scale in scales}
