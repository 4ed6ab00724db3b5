"""Which models and files an eraser fits: the transformers of a pipeline, and what is refused before anything changes.

A pipeline may have several transformers, experts for timesteps of their own (Wan 2.2). Its eraser is one folder with a
folder for each, named as the component of the pipeline, and all of it is loaded under one name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists

from diffusers_ext.core.tensor_files import FLOATING
from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.layer import check_scale, output_projection
from diffusers_ext.eraser.adapter.model import attention_width, complete_target, joint_attentions
from diffusers_ext.eraser.adapter.outputs import eraser_layers, unwrapped_transformer
from diffusers_ext.eraser.adapter.tensors import StateDict, check_fit, family_of_tensors, layer_name
from diffusers_ext.eraser.formats import FORMATS, EraserFile, read_eraser
from diffusers_ext.families import Family, denoisers_of, match_family

_EXPERTS = ("transformer", "transformer_2")  # of every pipeline that has several
EraserTarget = ModelMixin | DiffusionPipeline | PeftModel


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


def erased_models(transformer_or_pipe: EraserTarget) -> dict[str, ModelMixin]:
    """The transformers that an eraser is for by the folder of their part, `""` where there is one alone.

    Those of a pipeline with several are named as its components.
    """
    if isinstance(transformer_or_pipe, DiffusionPipeline):
        family = match_family(transformer_or_pipe, "eraser_adapter")
        experts = [] if family is None else list(family.expert_timesteps(transformer_or_pipe))
        models = {name: getattr(transformer_or_pipe, name, None) for name in experts}
        if len(models) > 1:
            return {name: find_transformer(model) for name, model in models.items() if model is not None}
    return {"": find_transformer(transformer_or_pipe)}


def read_parts(
    models: dict[str, ModelMixin],
    source: str | os.PathLike,
    *,
    subfolder: str | None = None,
    **download_arguments: Any,
) -> dict[str, EraserFile]:
    """The files of an eraser for those transformers; `ValueError` for one that was made for other experts."""
    folder = Path(source, subfolder or "")
    parts = sorted(path.name for path in folder.iterdir() if _holds_eraser(path)) if folder.is_dir() else []
    wanted = sorted(models)
    if folder.is_dir() and wanted != [""] and _holds_eraser(folder):
        raise ValueError(
            f"`{folder}` must hold a part for each of {wanted}, got an eraser of one transformer. Load it "
            "into the one it was trained on, as `pipe.transformer`."
        )
    known = set(parts) & set(_EXPERTS)
    if known and not _holds_eraser(folder) and (wanted == [""] or sorted(known) != wanted):
        has = "one transformer" if wanted == [""] else f"the transformers {wanted}"
        raise ValueError(
            f"`{folder}` must hold an eraser for {has}, got parts for {sorted(known)}. Load it into the pipeline "
            f"it was trained on, or one part into one transformer by `subfolder={sorted(known)[0]!r}`."
        )
    return {
        part: read_eraser(source, subfolder="/".join(filter(None, [subfolder, part])) or None, **download_arguments)
        for part in models
    }


def read_every_part(
    source: str | os.PathLike, *, subfolder: str | None = None, **download: Any
) -> dict[str, EraserFile]:
    """The files of an eraser without a model, by part: those of its folder, or one alone."""
    folder = Path(source, subfolder or "")
    parts = [part for part in _EXPERTS if _holds_eraser(folder / part)]
    if not parts and not folder.is_dir():
        try:
            return {"": read_eraser(source, subfolder=subfolder, **download)}
        except ValueError as error:
            inside = "/".join(filter(None, [subfolder, _EXPERTS[0]]))
            try:
                read_eraser(source, subfolder=inside, **download)
            except ValueError:
                raise error from None
            parts = list(_EXPERTS)
    elif not parts or _holds_eraser(folder):
        parts = [""]
    return {
        part: read_eraser(source, subfolder="/".join(filter(None, [subfolder, part])) or None, **download)
        for part in parts
    }


def _holds_eraser(folder: Path) -> bool:
    return any((folder / config).is_file() for config, _ in FORMATS.values())


def check_target(transformer: ModelMixin, adapter_name: str, scale: float) -> None:
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


def check_file(file: EraserFile, transformer: ModelMixin) -> None:
    """Raise `ValueError` unless the file is for this model and its config, completed by it, for its weights."""
    attentions = joint_attentions(transformer, file.config)
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
    family, own = family_of_config(file.config), match_family(transformer, "eraser_adapter")
    strange = found.isdisjoint(f"{name}.to_out.1" for name in joint_attentions(transformer, file.config))
    if strange or family not in (None, own):
        kind = family or family_of_tensors(file.tensors)
        raise ValueError(
            f"The eraser must be of the transformer's family, got one of {kind.title} for a "
            f"{type(transformer).__name__}. Load it into the model it was trained on."
        )


def family_of_config(config: EraserConfig) -> Family | None:
    """That of the model class that PEFT notes beside the config."""
    name = (config.auto_mapping or {}).get("base_model_class")
    return match_family(name, "eraser_adapter") if isinstance(name, str) else None


def check_in_memory(tensors: StateDict) -> None:
    """Raise `ValueError` for an eraser whose weights cannot be saved as they are held."""
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
