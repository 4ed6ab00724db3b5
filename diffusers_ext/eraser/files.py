"""Erasers on disk: put onto a model, saved from it, and written in the other format."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_ext.core.sources import check_download_arguments
from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.model import joint_attentions, remove_eraser
from diffusers_ext.eraser.adapter.outputs import eraser_layers
from diffusers_ext.eraser.adapter.tensors import PARTS, EraserShape, StateDict, family_of_tensors, layer_name, parts_of
from diffusers_ext.eraser.fit import (
    EraserTarget,
    check_file,
    check_in_memory,
    check_target,
    erased_models,
    family_of_config,
    read_parts,
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
from diffusers_ext.eraser.text_codebook import attach_text_codebook, attached_codebook
from diffusers_ext.families import match_family
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
        rank=len(next(tensor for name, tensor in tensors.items() if name.endswith("eraser_down.weight"))),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        **common,
    )


def facts_of_config(config: EraserConfig) -> dict[str, Any]:
    """What an eraser's config knows of the facts for its card; `None` for what it does not."""
    base = config.base_model_name_or_path or ""
    if base.count("/") > 1:  # more than a name on the Hub: a folder of the pipeline
        base = base.removesuffix("/transformer")
    return {"concept": config.concept, "anchor_concept": config.anchor_concept, "base_model": base or None}


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
    models = erased_models(transformer_or_pipe)
    for model in models.values():
        check_target(model, adapter_name, scale)
    files = read_parts(models, pretrained_model_name_or_path, subfolder=subfolder, **download_arguments)
    for part, model in models.items():
        check_file(files[part], model)
    with ExitStack() as undo:
        for part, model in models.items():
            _attach(files[part], model, adapter_name, scale, is_trainable)
            undo.callback(remove_eraser, model, adapter_name)
        undo.pop_all()
    return adapter_name


def _attach(file: EraserFile, transformer: ModelMixin, adapter_name: str, scale: float, is_trainable: bool) -> None:
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
    if file.codebook is not None:
        attach_text_codebook(transformer, adapter_name, file.codebook)
    # Its hooks list the layers that were there when it was switched on.
    _maybe_remove_and_reapply_group_offloading(transformer)


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
    files: dict[str, bytes] = {}
    models, tensors = erased_models(transformer_or_pipe), {}
    for part, transformer in models.items():
        given = {"concept": concept, "anchor_concept": anchor_concept, "base": base_model_name_or_path}
        config, own, codebook = _saved_part(transformer, adapter_name, dtype, **given)
        count = len(joint_attentions(transformer, config))
        contents = eraser_contents(format, config, own, count, type(transformer), codebook)
        files |= {f"{part}/{name}" if part else name: content for name, content in contents.items()}
        tensors |= {f"{part}.{name}": tensor for name, tensor in own.items()} if part else own
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


def _saved_part(
    transformer: ModelMixin, adapter_name: str | None, dtype: torch.dtype | None, base: str | None, **given: str | None
) -> tuple[EraserConfig, StateDict, torch.Tensor | None]:
    """What is written of one transformer's eraser: config, tensors, text codebook."""
    adapter_name = find_eraser(transformer, adapter_name)
    tensors = eraser_tensors(transformer, adapter_name)
    check_in_memory(tensors)
    tensors = {n: t.detach().to("cpu", dtype).contiguous() for n, t in tensors.items()}
    check_eraser_tensors(tensors, adapter_name, dtype)
    config = transformer.peft_config[adapter_name]
    # PEFT's own wrapper forgets the name of a diffusers model.
    known_name = config.base_model_name_or_path or transformer.config.get("_name_or_path")
    codebook = attached_codebook(transformer, adapter_name)
    codebook = None if codebook is None else codebook.to("cpu", dtype).contiguous()
    return described(config, **given, base_model_name_or_path=base or known_name or None), tensors, codebook


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
    family = family_of_config(config) or family_of_tensors(file.tensors)
    config.target_modules = config.target_modules or {family.eraser_target}
    config.in_features, config.num_layers = file.shape.width, file.num_layers
    model_class = import_class(family.denoiser_class)
    contents = eraser_contents(format, config, file.tensors, file.num_layers, model_class, file.codebook)
    write_eraser_files(folder, contents)
    return file.shape
