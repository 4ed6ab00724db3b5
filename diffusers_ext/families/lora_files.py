"""LoRA files: read, checked, and written for diffusers or ComfyUI/kohya with their metadata.

The metadata `ss_*`, `sshs_*` and `modelspec.*` are what ComfyUI, A1111 and managers of models read: names and values
of kohya's scripts and of Stability AI's ModelSpec 1.0.1. What is not known is left out; nothing of the machine or of
the time is written, so that equal LoRAs are equal files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save

from diffusers_ext.core.artifacts import sealed, tensors_offset, write_atomically
from diffusers_ext.core.lora_formats import (
    check_lora_effect,
    has_kohya_names,
    is_foreign_name,
    is_kohya_lora,
    read_dotted_lora,
    read_kohya_lora,
    to_comfyui_lora,
    to_kohya_lora,
)
from diffusers_ext.core.sources import LORA_WEIGHT_NAME, refuse_checkpoint
from diffusers_ext.core.tensor_files import DIGEST_KEY, open_tensors, read_tensors
from diffusers_ext.families import FAMILIES, Family, match_family
from diffusers_ext.families.family import import_class

# The file for ComfyUI and A1111. Diffusers looks for its own name first, so this one beside it is never
# loaded by mistake; a name that depends on no folder keeps equal trainings equal files.
KOHYA_NAME = "comfyui_a1111_kohya.safetensors"
# The file for ComfyUI of a transformer whose modules it calls otherwise than diffusers.
COMFYUI_NAME = "comfyui.safetensors"
FORMATS = ("diffusers", "kohya", "comfyui")
# Metadata that depend on the tensors, so they are written anew with every file.
_COMPUTED = ("ss_network_dim", "ss_network_alpha", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
# Of the format; scales are folded into B, so the adapter's settings no longer hold.
_FORMAT = ("format", LORA_ADAPTER_METADATA_KEY, DIGEST_KEY)
StateDict = dict[str, torch.Tensor]
LoraSource = str | os.PathLike | Mapping[str, torch.Tensor]


def read_lora(source: LoraSource, pipeline: Any = None) -> StateDict:
    """A LoRA with keys `<component>.<module>.lora_A.weight | .lora_B.weight`, of scale 1.

    Another scale (an `.alpha` entry, or `lora_alpha` in the file's metadata) is folded into B. Names of kohya's
    scripts, of PEFT (`base_model.model.`), of attention processors and bare ones become those of diffusers.

    Args:
        source: a safetensors file, a folder with `pytorch_lora_weights.safetensors`, or a state dict.
        pipeline: whose LoRA it is, its class or the name of one of diffusers: needed for the names that a
            transformer's LoRAs have in ComfyUI and kohya's scripts, which diffusers converts.
    """
    return read_lora_file(source, pipeline)[0]


def read_lora_file(source: LoraSource, pipeline: Any = None) -> tuple[StateDict, dict[str, str]]:
    """`read_lora`, and the metadata of the file; empty for a state dict."""
    raw, metadata, where = _load(source)
    if not raw:
        raise ValueError(f"{where} must hold a LoRA, got no tensors.")
    family = None if pipeline is None else match_family(pipeline)
    if family is not None and family.denoiser == "transformer" and any(map(is_foreign_name, raw)):
        kind = import_class(pipeline) if isinstance(pipeline, str) else pipeline
        try:
            raw = kind.lora_state_dict(dict(raw))
        except KeyError as error:
            raise ValueError(
                f"{where} must name every module that diffusers expects of a LoRA of {family.title}, got no {error}."
            ) from error
    lora = read_kohya_lora(raw, where) if is_kohya_lora(raw) else read_dotted_lora(raw, metadata, where)
    return lora, metadata


def _load(source: LoraSource) -> tuple[Mapping[str, torch.Tensor], dict[str, str], str]:
    if isinstance(source, Mapping):
        return source, {}, "`source`"
    path = Path(source)
    refuse_checkpoint(path)
    path = path / LORA_WEIGHT_NAME if path.is_dir() else path
    if not path.exists() or path.suffix != ".safetensors":
        raise ValueError(f"`source` must be a .safetensors file or a folder with one, got {source}.")
    tensors, metadata = read_tensors(path, finite=False)  # the checks of pairs come with names
    return tensors, metadata, str(path)


def check_loaded_lora(pipeline: DiffusionPipeline, adapter_name: str | None = None) -> int:
    """The number of modules that a loaded LoRA changes, any one where none is named; `ValueError` where it is 0."""
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    changed = 0
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, BaseTunerLayer) and hasattr(module, "lora_B"):
            names = module.lora_B if adapter_name is None else {adapter_name} & set(module.lora_B)
            changed += any(
                bool(module.lora_A[name].weight.any() and module.lora_B[name].weight.any()) for name in names
            )
    if not changed:
        raise ValueError(
            f"The loaded LoRA must change the model, got no effect (adapter: {adapter_name!r}). Its keys "
            "do not match this model, or it was never trained."
        )
    return changed


def export_lora(
    path: LoraSource,
    format: str = "diffusers",
    output_path: str | os.PathLike | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    pipeline: Any = None,
) -> StateDict:
    """Write a LoRA for diffusers, or with other key names: `"kohya"`'s and A1111's of a UNet, or `"comfyui"`'s.

    The metadata of the file that was read (trigger words, base model, author) goes along, under the given `metadata`.
    What depends on the tensors (rank, alpha, hashes) is written anew.

    Args:
        pipeline: that loads the LoRA, its class or the name of one of diffusers, which `"comfyui"` needs, and
            reading what ComfyUI's or kohya's scripts wrote for a transformer.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {FORMATS}, got {format!r}.")
    check_output_path(output_path)
    lora, found = read_lora_file(path, pipeline)
    check_lora_effect(lora)
    exported = lora if format == "diffusers" else _renamed(lora, format, pipeline)
    if output_path is not None:
        kept = {**kept_metadata(found), **(metadata or {})}
        kept.setdefault("modelspec.title", Path(output_path).stem)
        ranks = adapter_metadata(lora) if format == "diffusers" else {}
        write_lora(exported, output_path, {**lora_metadata(lora, exported, kept), **ranks})
    return exported


def _renamed(lora: StateDict, format: str, pipeline: Any) -> StateDict:
    """A LoRA in kohya's names, or in those that ComfyUI knows, which are kohya's for a UNet."""
    if format == "kohya" or has_kohya_names(lora):
        return to_kohya_lora(lora)
    family = None if pipeline is None else match_family(pipeline)
    if family is None or family.comfyui_names is None:
        raise ValueError(
            "`pipeline` must tell whose transformer the LoRA is of, one that ComfyUI reads, such as "
            f"'WanPipeline', got {getattr(pipeline, '__name__', pipeline)!r}."
        )
    return to_comfyui_lora(lora, family.comfyui_names)


def second_file(lora: Iterable[str], family: Family | None) -> str:
    """Name of the file that holds a LoRA for other programs, by its keys; empty where they need or know no other."""
    if has_kohya_names(lora := list(lora)):
        return KOHYA_NAME
    names = None if family is None else family.comfyui_names
    return COMFYUI_NAME if names is not None and set(to_comfyui_lora(dict.fromkeys(lora), names)) != set(lora) else ""


def add_second_file(
    folder: str | os.PathLike, pipeline: Any, metadata: Mapping[str, str] | None = None
) -> Path | None:
    """Write the LoRA of a folder once more for other programs, where they know none of its names; see `second_file`.

    Both files get the metadata.
    """
    source = Path(folder, LORA_WEIGHT_NAME)
    with open_tensors(source) as handle:
        name = second_file(handle.keys(), match_family(pipeline))
    if not name:
        return None
    metadata = {"modelspec.title": "LoRA", **(metadata or {})}
    export_lora(source, "comfyui", Path(folder, name), metadata=metadata, pipeline=pipeline)
    add_metadata(folder, metadata)
    return Path(folder, name)


def add_kohya_file(folder: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> Path:
    """Write the LoRA of a folder once more, as `comfyui_a1111_kohya.safetensors`.

    Those programs know none of the names in `pytorch_lora_weights.safetensors` and would load it without any effect;
    diffusers goes on loading that one. Both files get the metadata.
    """
    source, target = Path(folder, LORA_WEIGHT_NAME), Path(folder, KOHYA_NAME)
    metadata = {"modelspec.title": "LoRA", **(metadata or {})}
    export_lora(source, "kohya", target, metadata=metadata)
    add_metadata(folder, metadata)
    return target


def add_metadata(folder: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> Path:
    """Write the metadata into the `pytorch_lora_weights.safetensors` of a folder, over what it has there."""
    source = Path(folder, LORA_WEIGHT_NAME)
    tensors, found = read_tensors(source)
    found.pop(DIGEST_KEY, None)
    write_lora(tensors, source, {**found, "modelspec.title": "LoRA", **(metadata or {})})
    return source


def check_output_path(output_path: str | os.PathLike | None) -> None:
    """Raise `ValueError` for a file to write that is no safetensors file; `None` passes."""
    if output_path is not None and Path(output_path).suffix != ".safetensors":
        raise ValueError(f"`output_path` must end in .safetensors, got {output_path}.")


def write_lora(lora: StateDict, output_path: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> None:
    """Write a LoRA file with a digest, whole or not at all; its folder is made when absent."""
    Path(output_path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output_path, sealed(_separate(lora), {**(metadata or {}), "format": "pt"}))


def _separate(lora: Mapping[str, torch.Tensor]) -> StateDict:
    """Copies on the CPU: safetensors writes no tensors that share memory."""
    return {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in lora.items()}


def adapter_metadata(lora: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """`full_adapter_metadata`, empty where each component has one rank.

    Without it diffusers below 0.40 scales all modules of a component by the rank of one of them.
    """
    ranks = _ranks(lora)
    return {} if all(len(set(of.values())) == 1 for of in ranks.values()) else full_adapter_metadata(lora)


def _ranks(lora: Mapping[str, torch.Tensor]) -> dict[str, dict[str, int]]:
    """`{component: {module: rank}}` of a LoRA in diffusers' names."""
    ranks: dict[str, dict[str, int]] = {}
    for key, tensor in lora.items():
        component, _, name = key.partition(".")
        if name.endswith(".lora_A.weight"):
            # Of a text encoder without what transformers 4 alone puts before its names, as a pattern's end is matched.
            pattern = name.removesuffix(".lora_A.weight").removeprefix("text_model.")
            ranks.setdefault(component, {})[pattern] = tensor.shape[0]
    return ranks


def full_adapter_metadata(lora: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Settings of PEFT's adapters for a LoRA in diffusers' names, of scale 1.

    The patterns are always there: diffusers below 0.40 takes no settings without them.
    """
    settings: dict[str, Any] = {}
    for component, of in _ranks(lora).items():
        usual = Counter(of.values()).most_common()[0][0]
        start = "" if component.startswith("text_encoder") else "^"  # another name may end in this one
        others = {f"{start}{name}": rank for name, rank in of.items() if rank != usual}
        told = {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}
        settings |= {f"{component}.{name}": value for name, value in {**told, "target_modules": sorted(of)}.items()}
    return {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, sort_keys=True)}


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of a file's metadata goes along when the LoRA is written under other names."""
    return {name: value for name, value in metadata.items() if name not in {*_COMPUTED, *_FORMAT}}


def training_metadata(
    *,
    instance_prompt: str | None = None,
    base_model: str | None = None,
    prediction_type: str | None = None,
    resolution: int | None = None,
    num_pictures: int | None = None,
    caption_counts: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """What is known of a training; all pictures had the instance prompt where there are no `caption_counts`."""
    frequency = {"instance": dict(caption_counts or {instance_prompt: num_pictures})}
    told = {
        "modelspec.title": instance_prompt,  # that managers show
        "modelspec.trigger_phrase": instance_prompt,
        "modelspec.resolution": f"{resolution}x{resolution}" if resolution else None,
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}.get(prediction_type or ""),
        "ss_sd_model_name": base_model,
        "ss_resolution": f"({resolution}, {resolution})" if resolution else None,
        "ss_num_train_images": str(num_pictures) if num_pictures else None,
        "ss_tag_frequency": json.dumps(frequency) if instance_prompt and num_pictures else None,
    }
    return {name: value for name, value in told.items() if value is not None}


def lora_metadata(
    lora: Mapping[str, torch.Tensor], written: Mapping[str, torch.Tensor], kept: Mapping[str, str]
) -> dict[str, str]:
    """The metadata of a file of `lora` in the names `written`; `kept` wins over the family that is found here."""
    ranks = {tensor.shape[0] for key, tensor in lora.items() if key.endswith(".lora_A.weight")}
    # As kohya's scripts write ranks that differ from module to module.
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    alphas = {str(float(t)) for key, t in written.items() if key.endswith(".alpha")}
    # As kohya's scripts and A1111 identify LoRAs: of the file from its tensors on, so that metadata may be edited.
    content = save(_separate(written))
    digest = hashlib.sha256(memoryview(content)[tensors_offset(content) :]).hexdigest()
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "ss_network_module": "networks.lora",
        **_family(lora, kept),
        **kept,
        "ss_network_dim": dim,
        # Without alphas the scale is 1, which is an alpha as large as the rank.
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else dim if dim == "Dynamic" else str(float(dim)),
        "sshs_model_hash": digest,
        "modelspec.hash_sha256": f"0x{digest}",
    }


def _family(lora: Mapping[str, torch.Tensor], kept: Mapping[str, str]) -> dict[str, str]:
    """Version and architecture of the base model, where the width of its text tells."""
    widths = {
        tensor.shape[1]
        for key, tensor in lora.items()
        if key.startswith("unet.") and key.endswith((".attn2.to_k.lora_A.weight", ".attn2.to_v.lora_A.weight"))
    }
    known = {width: told for f in FAMILIES for width, told in f.lora_versions.items()}
    version, architecture = known.get(widths.pop() if len(widths) == 1 else 0, (None, None))
    if version is None:
        return {}
    prediction = kept.get("modelspec.prediction_type")
    if version == "sd_v2" and prediction:
        architecture = f"stable-diffusion-v2-{'768-v' if prediction == 'v' else '512'}/lora"
    told = {
        "ss_base_model_version": version + ("_v" if prediction == "v" else ""),
        "ss_v2": str(version == "sd_v2"),
        "modelspec.architecture": architecture,
    }
    return {name: value for name, value in told.items() if value is not None}
