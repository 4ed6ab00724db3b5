"""Names of the Linears whose inputs are counted: layers, slots and where they sit in a denoiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

import torch

from diffusers_ext.core.capture import natural_key
from diffusers_ext.core.settings import did_you_mean
from diffusers_ext.families import match_family
from diffusers_ext.families.family import Family

FEATURES = Family.features
SLOT_PATHS = {slot: path for _, slot, path in FEATURES.values()}


def linear_name(layer: str, slot: str) -> str:
    """Dotted name of the Linear of one slot, e.g. `...attn2` and `"k"` give `...attn2.to_k`."""
    if slot not in SLOT_PATHS:
        raise ValueError(f"`slot` must be one of {sorted(SLOT_PATHS)}, got {slot!r}.")
    return f"{layer}.{SLOT_PATHS[slot]}"


def split_linear_name(name: str) -> tuple[str, str]:
    """The (layer, slot) of a Linear's dotted name; inverse of `linear_name`."""
    for slot, path in SLOT_PATHS.items():
        if name.endswith("." + path):
            return name.removesuffix("." + path), slot
    raise ValueError(f"`name` must end in one of {sorted(SLOT_PATHS.values())}, got {name!r}.")


def layer_of(linear: str) -> str:
    """The layer that a Linear is part of, by their dotted names; a Linear of no slot is one by itself."""
    found = next((path for path in SLOT_PATHS.values() if linear.endswith("." + path)), None)
    return linear if found is None else linear.removesuffix("." + found)


def check_features(features: Sequence[str]) -> tuple[str, ...]:
    """The features in one order, whatever order was asked; raises `ValueError` for an unknown name."""
    features = (features,) if isinstance(features, str) else tuple(features)
    unknown = [feature for feature in features if feature not in FEATURES]
    if unknown or not features:
        raise ValueError(
            f"`features` must be among {list(FEATURES)}, got {unknown or 'none'}.{did_you_mean(unknown, FEATURES)}"
        )
    return tuple(feature for feature in FEATURES if feature in features)


def find_linears(
    denoiser: torch.nn.Module, features: Sequence[str], layers: str | Sequence[int] = "all"
) -> dict[str, torch.nn.Module]:
    """The Linears whose inputs are counted: `{dotted name: Linear or PEFT layer}`, in natural order.

    Args:
        features: names of `FEATURES`.
        layers: `"all"`, or indices of transformer blocks with cross-attention, in natural order.
    """
    modules, family = dict(denoiser.named_modules()), match_family(denoiser) or Family
    end = f".{family.text_attention}"
    blocks = sorted((name.removesuffix(end) for name in modules if name.endswith(end)), key=natural_key)
    if not blocks:
        raise ValueError(
            f"`denoiser` must have cross-attention layers named `{family.text_attention}`, got "
            f"{type(denoiser).__name__} without any."
        )
    blocks = [blocks[index] for index in check_layers(layers, len(blocks))]
    found: dict[str, torch.nn.Module] = {}
    for feature in check_features(features):
        block, _, path = family.features[feature]
        names = [f"{name}.{block}.{path}" for name in blocks if f"{name}.{block}.{path}" in modules]
        if not names:
            raise ValueError(f"`features` must exist in the model, got {feature!r}, which no layer has.")
        found.update({name: modules[name] for name in names})
    return {name: found[name] for name in sorted(found, key=natural_key)}


def check_layers(layers: str | Iterable[int], count: int) -> list[int]:
    """`layers` as ascending indices below `count`; raises `ValueError` for what is none."""
    if layers == "all":
        return list(range(count))
    indices = list(layers) if isinstance(layers, Iterable) else []
    wrong = [index for index in indices if not isinstance(index, Integral)]
    if wrong or not indices or min(indices) < 0 or max(indices) >= count:
        raise ValueError(f"`layers` must be 'all' or indices from 0 to {count - 1}, got {layers!r}.")
    return sorted({int(index) for index in indices})


def check_widths(denoiser: torch.nn.Module, widths: Mapping[str, int]) -> None:
    """Raise `ValueError` where a denoiser lacks a Linear of `{dotted name: in_features}`."""
    modules = dict(denoiser.named_modules())
    for linear, width in widths.items():
        if linear not in modules:
            raise ValueError(f"`statistics` must be of this model, got some of {linear!r}, which it lacks.")
        if modules[linear].in_features != width:
            raise ValueError(
                f"`statistics` of {linear!r} must have the model's width {modules[linear].in_features}, got {width}."
            )
