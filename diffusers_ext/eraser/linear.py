"""Linear erasers outside of this package: as ordinary LoRA files, and merged into the model's weights and back.

A linear eraser adds `s up(down(x))` to what the output projection makes of `x`, so that it is the LoRA
`W + s B A` of `to_out.0` with `A = down` `(rank, in)` and `B = up` `(out, rank)`: exact, in any program.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import inject_adapter_in_model
from torch import nn

from diffusers_ext.core.lora_formats import check_lora_effect, has_kohya_names, to_comfyui_lora, to_kohya_lora
from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from diffusers_ext.core.tensor_files import FLOATING
from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.layer import EraserLayer, check_scale, output_projection
from diffusers_ext.eraser.adapter.model import remove_eraser
from diffusers_ext.eraser.adapter.outputs import eraser_layers
from diffusers_ext.eraser.adapter.tensors import StateDict, family_of_tensors, layer_name
from diffusers_ext.eraser.files import eraser_tensors, find_eraser
from diffusers_ext.eraser.fit import erased_models, family_of_config, find_transformer, read_every_part
from diffusers_ext.families import Family, match_family
from diffusers_ext.families.lora_files import (
    COMFYUI_NAME,
    full_adapter_metadata,
    lora_metadata,
    second_file,
    write_lora,
)

_MERGED = "_merged_erasers"  # attribute of a model, {adapter name: MergedEraser}, in the order of merging


def lora_of_eraser(tensors: Mapping[str, torch.Tensor], component: str, scale: float = 1.0) -> StateDict:
    """`{<component>.<attention>.to_out.0.lora_A.weight | lora_B.weight}` of a linear eraser, its scale in B."""
    check_scale("tensors", scale)
    if any(name.endswith(".bias") for name in tensors):
        raise ValueError(
            "The eraser must be of the kind 'linear' to be a LoRA, got 'gelu': GELU lies between its projections. "
            "Train one with `--kind linear`."
        )
    lora: StateDict = {}
    for name, tensor in tensors.items():
        attention, _, part = name.partition(".to_out.1.eraser_")
        end, factor = {"down.weight": ("lora_A", 1.0), "up.weight": ("lora_B", scale)}[part]
        # One number type: B in that of the file, as every loader reads it.
        lora[f"{component}.{attention}.to_out.0.{end}.weight"] = (tensor.float() * factor).to(tensor.dtype)
    check_lora_effect(lora)
    return lora


def export_eraser_lora(
    lora: Mapping[str, torch.Tensor], save_directory: str | os.PathLike, family: Family, title: str = "eraser"
) -> list[Path]:
    """Write a linear eraser, as `lora_of_eraser` gives it, as LoRA files that need no code of this package.

    `pytorch_lora_weights.safetensors` is for diffusers (`load_lora_weights`), with its alpha in the metadata;
    `comfyui.safetensors`, or `comfyui_a1111_kohya.safetensors` of a UNet, has the names of those programs and an
    `alpha` beside each pair, where the family tells them. Each alpha is the rank: a scale of 1.
    """
    folder, lora = Path(save_directory), dict(lora)
    rank = next(len(a) for key, a in lora.items() if key.endswith(".lora_A.weight"))
    told = {"modelspec.title": title}
    written = [folder / LORA_WEIGHT_NAME]
    write_lora(lora, written[0], {**lora_metadata(lora, lora, told), **full_adapter_metadata(lora)})
    other = "" if family.comfyui_names is None else second_file(lora, family) or COMFYUI_NAME
    if other:
        if has_kohya_names(lora):
            exported = to_kohya_lora(lora)
        else:
            exported = to_comfyui_lora(lora, family.comfyui_names)
            pairs = [key for key in exported if key.endswith(".lora_A.weight")]
            alphas = {key.replace(".lora_A.weight", ".alpha"): torch.tensor(float(rank)) for key in pairs}
            exported = {**exported, **alphas}
        write_lora(exported, folder / other, lora_metadata(lora, exported, told))
        written.append(folder / other)
    return written


def convert_eraser_to_lora(
    pretrained_model_name_or_path: str | os.PathLike,
    save_directory: str | os.PathLike,
    *,
    scale: float = 1.0,
    title: str | None = None,
    subfolder: str | None = None,
    **download_arguments: Any,
) -> list[Path]:
    """Write a saved linear eraser as `export_eraser_lora` does, from its files alone; returns the files.

    An eraser with a part for each of two transformers becomes as many LoRAs, in folders of their names: diffusers
    loads them by `load_lora_weights(folder, subfolder="transformer")`, and `subfolder="transformer_2"` with
    `load_into_transformer_2=True`.

    Args:
        scale: strength that the LoRA has at 1.
        title: what programs show; by default what is erased.
        download_arguments: as of `load_eraser`.
    """
    files = read_every_part(pretrained_model_name_or_path, subfolder=subfolder, **download_arguments)
    loras = {}
    for part, file in files.items():
        _refuse_codebook(file.config, str(pretrained_model_name_or_path))
        family = family_of_config(file.config) or family_of_tensors(file.tensors)
        loras[part] = lora_of_eraser(file.tensors, family.denoiser, scale), family, title or file.config.concept
    written = []
    for part, (lora, family, name) in loras.items():
        written += export_eraser_lora(lora, Path(save_directory, part), family, name or "eraser")
    return written


@dataclass
class MergedEraser:
    """What takes a merge back: the weights from before, and the eraser."""

    config: EraserConfig
    tensors: StateDict
    scales: dict[str, float]  # by attention
    weights: StateDict  # of the output projections by attention, copies on the CPU
    active: bool
    trainable: bool


def merge_eraser(
    transformer_or_pipe: ModelMixin | DiffusionPipeline, adapter_name: str | None = None, scale: float | None = None
) -> str:
    """Put a linear eraser into the weights, `W + s up down` in float32, rounded once; `unmerge_eraser` takes it back.

    The model lacks the adapter afterwards and is saved by `save_pretrained` as any other; it costs nothing more.
    The weights from before stay in memory, on the CPU, until the merge is taken back. One with GELU is refused. Of a
    pipeline with two transformers, both parts are merged, or none.

    Args:
        adapter_name: which; the only one when `None`; it is returned.
        scale: strength; by default the one it has.
    """
    models = list(erased_models(transformer_or_pipe).values())
    names = [_check_merge(model, adapter_name, scale) for model in models]
    if len(set(names)) > 1:
        raise ValueError(f"`adapter_name` must be the same eraser of both transformers, got {names}. Give the name.")
    for model in models:
        _merge(model, names[0], scale)
    return names[0]


def _check_merge(transformer: ModelMixin, adapter_name: str | None, scale: float | None) -> str:
    """The name of the eraser to be merged; raises `ValueError` where it cannot be."""
    name = find_eraser(transformer, adapter_name)
    config = transformer.peft_config[name]
    _refuse_codebook(config, name)
    if config.kind != "linear":
        raise ValueError(
            f"`adapter_name` must name an eraser of the kind 'linear' to be merged, got {name!r} of the kind "
            f"{config.kind!r}: GELU lies between its projections. Train one with `--kind linear`, or keep it loaded."
        )
    for at, layer in _layers_of(transformer, name).items():
        check_scale(name, layer.scaling[name] if scale is None else scale)
        _check_mergeable(at, output_projection(transformer.get_submodule(at)))
    return name


def _layers_of(transformer: ModelMixin, name: str) -> dict[str, EraserLayer]:
    return {at: layer for at, layer in eraser_layers(transformer).items() if name in layer.eraser_down}


def _merge(transformer: ModelMixin, name: str, scale: float | None) -> None:
    layers = _layers_of(transformer, name)
    first = next(iter(layers.values()))
    scales = {at: layer.scaling[name] if scale is None else scale for at, layer in layers.items()}
    projections = {at: output_projection(transformer.get_submodule(at)) for at in layers}
    tensors = {key: tensor.detach().clone() for key, tensor in eraser_tensors(transformer, name).items()}
    merged = MergedEraser(
        transformer.peft_config[name],
        tensors,
        {at: layer.scaling[name] for at, layer in layers.items()},
        {at: projection.weight.detach().to("cpu", copy=True) for at, projection in projections.items()},
        name in first.active_adapters,
        any(parameter.requires_grad for parameter in first.eraser_down[name].parameters()),
    )
    with torch.no_grad():
        for at, projection in projections.items():
            weight = projection.weight
            update = tensors[layer_name(at, "up.weight")].float() @ tensors[layer_name(at, "down.weight")].float()
            weight.copy_((weight.float() + scales[at] * update.to(weight.device)).to(weight.dtype))
    remove_eraser(transformer, name)
    vars(transformer).setdefault(_MERGED, {})[name] = merged


def unmerge_eraser(transformer_or_pipe: ModelMixin | DiffusionPipeline, adapter_name: str | None = None) -> str:
    """Give the weights back to the bit, and the eraser as it was; the last that was merged comes first."""
    models = list(erased_models(transformer_or_pipe).values())
    names = [_check_unmerge(model, adapter_name) for model in models]
    if len(set(names)) > 1:
        raise ValueError(f"`adapter_name` must be the eraser that was merged last into both, got {names}. Give it.")
    for model in models:
        merged: dict[str, MergedEraser] = vars(model)[_MERGED]
        with torch.no_grad():
            for at, weight in merged[names[0]].weights.items():
                output_projection(model.get_submodule(at)).weight.copy_(weight)
        _restore(model, names[0], merged.pop(names[0]))
    return names[0]


def _check_unmerge(transformer: ModelMixin, adapter_name: str | None) -> str:
    """The name of the eraser that was merged last; raises `ValueError` where it cannot come back."""
    last = next(reversed(vars(transformer).get(_MERGED, {})), None)
    if last is None or adapter_name not in (None, last):
        raise ValueError(
            f"`adapter_name` must be the eraser that was merged last, {last!r}, got {adapter_name!r}. "
            "Take merges back in the opposite order."
        )
    if last in getattr(transformer, "peft_config", {}):
        raise ValueError(
            f"`adapter_name` must be free again, got {last!r}, which another adapter has. Delete that one."
        )
    return last


def _restore(transformer: ModelMixin, name: str, eraser: MergedEraser) -> None:
    adapted = [part for part in transformer.modules() if hasattr(part, "active_adapters") and part is not transformer]
    active = {one: None for part in adapted for one in part.active_adapters}
    gradients = [(weight, weight.requires_grad) for weight in transformer.parameters()]
    inject_adapter_in_model(eraser.config, transformer, name)
    transformer._hf_peft_config_loaded = True
    layers: list[Any] = [part for part in transformer.modules() if isinstance(part, EraserLayer)]
    for part in dict.fromkeys([*adapted, *layers]):
        part.set_adapter([*active, name] if eraser.active else list(active))
    for weight, required in gradients:
        weight.requires_grad_(required)
    for key, parameter in eraser_tensors(transformer, name).items():
        with torch.no_grad():
            parameter.copy_(eraser.tensors[key])
        parameter.requires_grad_(eraser.trainable)
    for at, layer in eraser_layers(transformer).items():
        layer.set_scale(name, eraser.scales.get(at, 1.0))


def _refuse_codebook(config: EraserConfig, name: str) -> None:
    if config.text_codebook_size is not None:
        raise ValueError(
            f"An eraser must have no text codebook to be a LoRA or merged, got {name!r} with one of "
            f"{config.text_codebook_size} tokens: rounding is no change of weights. Keep it loaded by `load_eraser`, "
            "or train it without `--text_codebook_size`."
        )


def _check_mergeable(attention: str, projection: nn.Module) -> None:
    weight = projection.weight
    if callable(weight) or weight.is_meta or weight.dtype not in FLOATING or type(weight.data) is not torch.Tensor:
        kind = "a quantised one" if callable(weight) else f"{weight.dtype} on {weight.device}"
        raise ValueError(
            f"The weights that an eraser is merged into must be in memory, in floating point, got {kind} at "
            f"`{attention}.to_out.0`. Merge before quantising or offloading, or export the eraser as a LoRA."
        )


def family_of(transformer_or_pipe: ModelMixin | DiffusionPipeline) -> Family:
    """Of a model that erasers attach to."""
    return match_family(find_transformer(transformer_or_pipe), "eraser_adapter")
