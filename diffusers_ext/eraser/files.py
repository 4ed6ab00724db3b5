"""Erasers on disk: put onto a model, saved from it, and written in the other format."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists

from diffusers_ext.core.sources import check_download_arguments
from diffusers_ext.core.tensor_files import FLOATING
from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.layer import check_scale, output_projection
from diffusers_ext.eraser.adapter.model import attention_width, complete_target, joint_attentions
from diffusers_ext.eraser.adapter.outputs import eraser_layers, unwrapped_transformer
from diffusers_ext.eraser.adapter.tensors import (
    PARTS,
    EraserShape,
    StateDict,
    check_fit,
    eraser_shape,
    family_of_tensors,
    layer_name,
    parts_of,
)
from diffusers_ext.eraser.formats import (
    FILE_NAMES,
    EraserFile,
    check_eraser_folder,
    check_eraser_tensors,
    described,
    eraser_contents,
    read_eraser,
    write_eraser_files,
)
from diffusers_ext.families import Family, denoisers_of, match_family
from diffusers_ext.families.family import import_class
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.hub.push import push_folder, split_arguments


def eraser_card(
    tensors: StateDict,
    *,
    pipeline: str | None = None,
    concept: str | None = None,
    anchor_concept: str | None = None,
    preserved_concepts: Sequence[str] | None = None,
    **common: Any,
) -> Callable[..., Card]:
    """The card of an eraser but for the repository's name; `common` are facts of every card, as of `make_card`.

    `preserved_concepts` are those that the training kept on purpose; empty when there were none.
    """
    return make_card(
        "eraser",
        concept=concept,
        anchor_concept=anchor_concept or "",
        preserved_concepts=None if preserved_concepts is None else list(preserved_concepts),
        pipeline=pipeline or family_of_tensors(tensors).pipelines[0],
        rank=eraser_shape(tensors).rank,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        **common,
    )


def facts_of_config(config: EraserConfig) -> dict[str, Any]:
    """What an eraser's config knows of the facts for its card; `None` for what it does not."""
    base = config.base_model_name_or_path or ""
    if base.count("/") > 1:  # more than a name on the Hub: a folder of the pipeline
        base = base.removesuffix("/transformer")
    return {"concept": config.concept, "anchor_concept": config.anchor_concept, "base_model": base or None}


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

    Its weights are float32. `enable_layerwise_casting()` stores all weights it finds in few bits, so call that before;
    `enable_sequential_cpu_offload()` comes after.

    Args:
        transformer_or_pipe: a denoiser of a family that erasers attach to, compiled or not, or a pipeline with one;
            left as it was where anything is refused.
        pretrained_model_name_or_path: a folder, or `"user/name"`, in PEFT's format or with `eraser_weights.pt` and
            `eraser_config.json`.
        adapter_name: its name in the transformer, another one for every adapter; it is returned.
        scale: strength, at least 0; 0 is the model without it, 1 the eraser as it was trained.
        is_trainable: train it on; everything else is frozen then. Otherwise it is frozen and the rest left as it is.
        download_arguments: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`.
    """
    check_download_arguments(download_arguments, "load_eraser")
    if isinstance(transformer_or_pipe, PeftModel):
        raise TypeError(
            "`transformer_or_pipe` must be a transformer or a pipeline, got a PeftModel. Use its own `load_adapter`."
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
    for name, parameter in eraser_tensors(transformer, adapter_name).items():
        with torch.no_grad():
            parameter.copy_(file.tensors[name])
        parameter.requires_grad_(is_trainable)
    for layer in eraser_layers(transformer).values():
        layer.set_scale(adapter_name, scale)
    # Its hooks list the layers that were there when it was switched on.
    _maybe_remove_and_reapply_group_offloading(transformer)
    return adapter_name


def find_transformer(transformer_or_pipe: EraserTarget) -> ModelMixin:
    """The denoiser itself, out of a pipeline, `torch.compile` or a `PeftModel`."""
    held = transformer_or_pipe
    if isinstance(held, DiffusionPipeline):
        family = match_family(held, "eraser_adapter")
        held = getattr(held, family.denoiser if family else "transformer", None)
    model = unwrapped_transformer(held)
    if model is None:
        raise TypeError(
            f"`transformer_or_pipe` must be a {denoisers_of('eraser_adapter')} or a pipeline with one, "
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
            f"`adapter_name` must name an eraser of the transformer, got {adapter_name!r}; it has {names or 'none'}."
        )
    return adapter_name


def eraser_tensors(transformer: ModelMixin, adapter_name: str) -> StateDict:
    """The parameters of one eraser, named as in the transformer without the adapter's name."""
    return {
        layer_name(attention, part): getattr(layer, module)[adapter_name].get_parameter(kind)
        for attention, layer in eraser_layers(transformer).items()
        if adapter_name in layer.eraser_down
        for part, (module, kind) in PARTS.items()
        if part in parts_of(layer.kinds[adapter_name])
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
            f"`adapter_name` must be a name without dots, got {adapter_name!r}. Name it after its concept."
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
    attentions = joint_attentions(transformer)
    widths = {name: attention_width(attention) for name, attention in attentions.items()}
    found = {name.rpartition(".eraser_")[0] for name in file.tensors}
    _check_family(file, transformer, found)
    check_fit(file.shape, max(widths.values()), len(attentions), file.num_layers)
    config = file.config
    complete_target(config, transformer)
    wanted = {name for name, _ in transformer.named_modules() if check_target_module_exists(config, name)}
    if wanted != found:
        raise ValueError(
            f"The eraser must have weights for the {len(wanted)} layers that its config names, got "
            f"{len(found)} (differing: {sorted(wanted ^ found)[:3]}). Save it again."
        )
    for name in sorted(found):
        attention = name.removesuffix(".to_out.1")
        inner = output_projection(attentions[attention]).in_features if config.kind == "linear" else widths[attention]
        sizes = (file.tensors[layer_name(attention, "down.weight")].shape[1], inner)
        sizes += (file.tensors[layer_name(attention, "up.weight")].shape[0], widths[attention])
        if sizes[0] != sizes[1] or sizes[2] != sizes[3]:
            raise ValueError(
                f"The eraser must fit the transformer, whose `{attention}` reads {sizes[1]} and has width {sizes[3]}, "
                f"got one that reads {sizes[0]}, of width {sizes[2]}. Load it into the model it was trained on."
            )


def _check_family(file: EraserFile, transformer: ModelMixin, found: set[str]) -> None:
    """Raise `ValueError` where an eraser is of another family, by the class beside its config or by its names."""
    family, own = _family_of_config(file.config), match_family(transformer, "eraser_adapter")
    strange = found.isdisjoint(f"{name}.to_out.1" for name in joint_attentions(transformer))
    if strange or family not in (None, own):
        kind = family or family_of_tensors(file.tensors)
        raise ValueError(
            f"The eraser must be of the transformer's family, got one of {kind.title} for a "
            f"{type(transformer).__name__}. Load it into the model it was trained on."
        )


def _family_of_config(config: EraserConfig) -> Family | None:
    """That of the model class that PEFT notes beside the config."""
    name = (config.auto_mapping or {}).get("base_model_class")
    return match_family(name, "eraser_adapter") if isinstance(name, str) else None


def save_eraser(
    transformer_or_pipe: EraserTarget,
    save_directory: str | os.PathLike,
    *,
    adapter_name: str | None = None,
    format: str = "peft",
    dtype: torch.dtype | None = None,
    concept: str | None = None,
    anchor_concept: str | None = None,
    base_model_name_or_path: str | None = None,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **hub_arguments: Any,
) -> None:
    """Write an eraser to a folder that `load_eraser` reads; equal erasers are equal files.

    The format `"peft"` (`adapter_config.json`, `adapter_model.safetensors`) is also what `PeftModel.from_pretrained`
    reads. `"legacy"` (`eraser_config.json`, `eraser_weights.pt`) is for the code of T2VUnlearning; it keeps neither
    the concept nor the model's name. Facts not given are those of the eraser's config, or of the transformer.

    Args:
        transformer_or_pipe: a denoiser with an eraser, compiled or not, a pipeline or PeftModel of it.
        save_directory: folder, made when absent; other files in it stay. Nothing is written where anything is refused.
        adapter_name: which eraser; the only one when `None`.
        dtype: of the saved weights; as they are when `None`.
        base_model_name_or_path: the transformer it is for.
        push_to_hub: upload these files afterwards, in place of an eraser in the other format.
        repo_id: repository; the folder's name when `None`.
        hub_arguments: with `push_to_hub`: `private`, `token`, `revision`, `create_pr`, `commit_message`, `subfolder`;
            and for the model card `trained_on`, `preserved_concepts`, `base_model` (the pipeline; as
            `base_model_name_or_path` when absent), `license`, `settings` and `results`.
    """
    folder = Path(save_directory)
    check_eraser_folder(folder, format)
    transformer = find_transformer(transformer_or_pipe)
    adapter_name = find_eraser(transformer, adapter_name)
    tensors = eraser_tensors(transformer, adapter_name)
    _check_in_memory(tensors)
    tensors = {n: t.detach().to("cpu", dtype).contiguous() for n, t in tensors.items()}
    check_eraser_tensors(tensors, adapter_name, dtype)
    config = transformer.peft_config[adapter_name]
    # PEFT's own wrapper forgets the name of a diffusers model.
    known_name = config.base_model_name_or_path or transformer.config.get("_name_or_path")
    config = described(
        config,
        concept=concept,
        anchor_concept=anchor_concept,
        base_model_name_or_path=base_model_name_or_path or known_name or None,
    )
    num_layers = len(joint_attentions(transformer))
    files = eraser_contents(format, config, tensors, num_layers, type(transformer))
    if push_to_hub:
        hub, facts = split_arguments(hub_arguments)
        pipeline = match_family(transformer, "eraser_adapter").pipelines[0]
        card = eraser_card(tensors, pipeline=pipeline, token=hub.get("token"), **{**facts_of_config(config), **facts})
    elif hub_arguments:
        raise TypeError(f"{sorted(hub_arguments)} must come with `push_to_hub=True`, got them without.")
    write_eraser_files(folder, files)
    if push_to_hub:
        # Not the folder itself, which may hold the checkpoints of a training run.
        with tempfile.TemporaryDirectory() as upload:
            write_eraser_files(Path(upload), files)
            name = repo_id or folder.resolve().name
            push_folder(upload, name, card, delete_patterns=FILE_NAMES, **hub)


def _check_in_memory(tensors: StateDict) -> None:
    for name, tensor in tensors.items():
        kind = type(tensor.data).__name__
        if tensor.dtype not in FLOATING or kind != "Tensor":
            stored = str(tensor.dtype) if kind == "Tensor" else f"a {kind}"
            raise ValueError(
                "The eraser's weights must be float16, bfloat16, float32 or float64 to be saved, got "
                f"`{name}` as {stored}, as after layerwise casting or a quantisation of the "
                "transformer. Save the eraser before that, or copy the files it was loaded from."
            )
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        raise ValueError(
            "The eraser's weights must be in memory, got the meta device, as after "
            "`enable_sequential_cpu_offload()`. Save it before that call."
        )


def convert_eraser(
    pretrained_model_name_or_path: str | os.PathLike,
    save_directory: str | os.PathLike,
    format: str,
    *,
    concept: str | None = None,
    anchor_concept: str | None = None,
    base_model_name_or_path: str | None = None,
    **download_arguments: Any,
) -> EraserShape:
    """Read an eraser in either format and write it in one; its weights stay what they are.

    The source is given as to `load_eraser` (`subfolder` among the `download_arguments`), the rest as to `save_eraser`.
    Returns what the tensors say about the model it is for.
    """
    download = {name: value for name, value in download_arguments.items() if name != "subfolder"}
    check_download_arguments(download, "convert_eraser")
    folder = Path(save_directory)
    check_eraser_folder(folder, format)
    file = read_eraser(pretrained_model_name_or_path, **download_arguments)
    check_eraser_tensors(file.tensors, str(pretrained_model_name_or_path))
    if format == "legacy" and file.num_layers is None:
        raise ValueError(
            "`num_layers` of the eraser's config must be known to write the legacy format, got "
            f"None in {pretrained_model_name_or_path}. Load it into its model and save it again."
        )
    config = described(
        file.config, concept=concept, anchor_concept=anchor_concept, base_model_name_or_path=base_model_name_or_path
    )
    family = _family_of_config(config) or family_of_tensors(file.tensors)
    config.target_modules = config.target_modules or {family.eraser_target}
    config.in_features, config.num_layers = file.shape.width, file.num_layers
    model_class = import_class(family.denoiser_class)
    write_eraser_files(folder, eraser_contents(format, config, file.tensors, file.num_layers, model_class))
    return file.shape
