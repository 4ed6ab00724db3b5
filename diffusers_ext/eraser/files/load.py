"""Load an eraser into a CogVideoX transformer, beside the adapters it has already."""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists

from diffusers_ext.core.sources import check_download_arguments
from diffusers_ext.eraser.adapter.config import EraserConfig, transformer_width
from diffusers_ext.eraser.adapter.layer import check_scale
from diffusers_ext.eraser.adapter.outputs import eraser_layers
from diffusers_ext.eraser.files.convert import PARTS, StateDict, check_fit, layer_name
from diffusers_ext.eraser.files.formats import EraserFile, read_eraser
from diffusers_ext.families.registry import denoisers_of, find_family, match_family


EraserTarget = ModelMixin | DiffusionPipeline | PeftModel


def load_eraser(
    transformer_or_pipe: ModelMixin | DiffusionPipeline,
    pretrained_model_name_or_path: str | os.PathLike,
    *,
    adapter_name: str = "default",
    scale: float = 1.0,
    is_trainable: bool = False,
    subfolder: str | None = None,
    **download_arguments: Any,
) -> str:
    """Add a saved eraser to a transformer, switched on beside the adapters that are on already.

    Its weights are float32. `enable_layerwise_casting()` stores all weights it finds in few bits,
    so call that before; `enable_sequential_cpu_offload()` comes after.

    Args:
        transformer_or_pipe: a CogVideoX transformer, compiled or not, or a pipeline with one.
        pretrained_model_name_or_path: a folder, or `"user/name"`, in PEFT's format or with
            `eraser_weights.pt` and `eraser_config.json`.
        adapter_name: its name in the transformer, another one for every adapter.
        scale: strength, at least 0; 0 is the model without it, 1 the eraser as it was trained.
        is_trainable: train it on; everything else is frozen then. Otherwise it is frozen and the
            rest left as it is.
        subfolder: folder inside the source.
        download_arguments: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`.

    Returns:
        `adapter_name`.

    Raises:
        ValueError: missing or damaged files, an eraser of another model, a name in use, adapters
            that are disabled, sequential CPU offload. The transformer is left as it was.
        TypeError: not a CogVideoX transformer, or a keyword that is none of a download.
    """
    check_download_arguments(download_arguments, "load_eraser")
    if isinstance(transformer_or_pipe, PeftModel):
        raise TypeError(
            "`transformer_or_pipe` must be a transformer or a pipeline, got a PeftModel. Use its "
            "own `load_adapter`."
        )
    transformer = find_transformer(transformer_or_pipe)
    _check_target(transformer, adapter_name, scale)
    file = read_eraser(pretrained_model_name_or_path, subfolder=subfolder, **download_arguments)
    _check_file(file, transformer)
    file.config.inference_mode = not is_trainable
    active = {name: None for part in _adapted(transformer) for name in part.active_adapters}
    gradients = [(weight, weight.requires_grad) for weight in transformer.parameters()]
    inject_adapter_in_model(file.config, transformer, adapter_name)
    transformer._hf_peft_config_loaded = True  # as `add_adapter` of diffusers does
    for part in _adapted(transformer):
        part.set_adapter([*active, adapter_name])
    for weight, required in gradients:
        weight.requires_grad_(required and not is_trainable)
    _fill(transformer, adapter_name, file.tensors, scale, is_trainable)
    # Its hooks list the layers that were there when it was switched on.
    _maybe_remove_and_reapply_group_offloading(transformer)
    return adapter_name


def find_transformer(transformer_or_pipe: EraserTarget) -> ModelMixin:
    """The CogVideoX transformer itself, out of a pipeline, `torch.compile` or a `PeftModel`."""
    model = transformer_or_pipe
    if isinstance(model, DiffusionPipeline):
        model = getattr(model, "transformer", None)
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if match_family(model, "eraser") is None:
        raise TypeError(
            f"`transformer_or_pipe` must be a {denoisers_of('eraser')} or a pipeline with one, "
            f"got a {type(transformer_or_pipe).__name__}."
        )
    return model


def find_eraser(transformer: ModelMixin, adapter_name: str | None = None) -> str:
    """The name of an eraser of the transformer; of the only one when `None`."""
    adapters = getattr(transformer, "peft_config", {})
    names = [name for name, config in adapters.items() if isinstance(config, EraserConfig)]
    if adapter_name is None and len(names) == 1:
        return names[0]
    if adapter_name not in names:
        raise ValueError(
            f"`adapter_name` must name an eraser of the transformer, got {adapter_name!r}; it has "
            f"{names or 'none'}."
        )
    return adapter_name


def eraser_tensors(transformer: ModelMixin, adapter_name: str) -> StateDict:
    """The parameters of one eraser, named as in the transformer without the adapter's name."""
    return {
        layer_name(attention, part): getattr(layer, module)[adapter_name].get_parameter(kind)
        for attention, layer in eraser_layers(transformer).items()
        if adapter_name in layer.eraser_down
        for part, (module, kind) in PARTS.items()
    }


def _adapted(transformer: ModelMixin) -> list[BaseTunerLayer]:
    return [part for part in transformer.modules() if isinstance(part, BaseTunerLayer)]


def _check_target(transformer: ModelMixin, adapter_name: str, scale: float) -> None:
    """Raise `ValueError` for a transformer, a name or a scale that nothing can be loaded with."""
    taken = list(getattr(transformer, "peft_config", {}))
    if adapter_name in taken:
        raise ValueError(
            f"`adapter_name` must not be in use, got {adapter_name!r} beside {taken}. Choose "
            "another name, or delete the adapter first."
        )
    if not adapter_name or "." in adapter_name:
        raise ValueError(
            f"`adapter_name` must be a name without dots, got {adapter_name!r}. Name it after its "
            "concept."
        )
    check_scale(adapter_name, scale)
    if any(weight.is_meta for weight in transformer.parameters()):
        raise ValueError(
            "`transformer_or_pipe` must hold its weights, got some on the meta device, as after "
            "`enable_sequential_cpu_offload()`. Load the eraser before that call."
        )
    if any(layer.disable_adapters for layer in eraser_layers(transformer).values()):
        raise ValueError(
            "The transformer's erasers must be on to get another one, got them disabled. Call "
            "`enable_adapters()` first."
        )


def _check_file(file: EraserFile, transformer: ModelMixin) -> None:
    """Raise `ValueError` unless the file is for this model and its config for its weights."""
    num_blocks = len(getattr(transformer, find_family(transformer, "eraser").blocks))
    check_fit(file.shape, transformer_width(transformer.config), num_blocks, file.num_layers)
    config = file.config
    config.target_modules = config.target_modules or {
        find_family(transformer, "eraser").eraser_target
    }
    wanted = {
        name for name, _ in transformer.named_modules() if check_target_module_exists(config, name)
    }
    found = {name.rpartition(".eraser_")[0] for name in file.tensors}
    if wanted != found:
        raise ValueError(
            f"The eraser must have weights for the {len(wanted)} layers that its config names, got "
            f"{len(found)} (differing: {sorted(wanted ^ found)[:3]}). Save it again."
        )


def _fill(
    transformer: ModelMixin,
    adapter_name: str,
    tensors: StateDict,
    scale: float,
    is_trainable: bool,
) -> None:
    for name, parameter in eraser_tensors(transformer, adapter_name).items():
        with torch.no_grad():
            parameter.copy_(tensors[name])
        parameter.requires_grad_(is_trainable)
    for layer in eraser_layers(transformer).values():
        layer.set_scale(adapter_name, scale)
