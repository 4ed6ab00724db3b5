"""LoRA files: read them module by module, check them, write them for diffusers or ComfyUI/kohya."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key

from diffusers_ext.core.artifacts import sealed, write_atomically
from diffusers_ext.core.sources import LORA_WEIGHT_NAME, refuse_checkpoint
from diffusers_ext.core.tensor_files import DIGEST_KEY, read_tensors
from diffusers_ext.nullspace.lora_formats import (
    LoraKey,
    adapter_settings,
    check_lora_effect,
    check_pair,
    check_rank,
    is_kohya_lora,
    parse_key,
    read_kohya_lora,
    to_kohya_lora,
)
from diffusers_ext.nullspace.lora_metadata import kept_metadata, lora_metadata

# The file for ComfyUI and A1111. Diffusers looks for its own name first, so this one beside it is never
# loaded by mistake; a name that depends on no folder keeps equal trainings equal files.
KOHYA_NAME = "comfyui_a1111_kohya.safetensors"
FORMATS = ("diffusers", "kohya")
StateDict = dict[str, torch.Tensor]
LoraSource = str | os.PathLike | Mapping[str, torch.Tensor]


def read_lora(source: LoraSource) -> StateDict:
    """A LoRA with keys `<component>.<module>.lora_A.weight | .lora_B.weight`, of scale 1.

    A scale other than 1 (an `.alpha` entry, or `lora_alpha` in the file's metadata) is folded into B. Names of kohya's
    scripts, of PEFT (`base_model.model.`), of attention processors and bare ones become those of diffusers.

    Args:
        source: a safetensors file, a folder with `pytorch_lora_weights.safetensors`, or a state dict.

    Raises:
        ValueError: no such file, a key that is not of a LoRA, an A without its B, shapes or ranks that do not fit,
            numbers that are not finite, DoRA. The message names the file.
    """
    return read_lora_file(source)[0]


def read_lora_file(source: LoraSource) -> tuple[StateDict, dict[str, str]]:
    """`read_lora`, and the metadata of the file; empty for a state dict."""
    raw, metadata, where = _load(source)
    if not raw:
        raise ValueError(f"{where} must hold a LoRA, got no tensors.")
    if is_kohya_lora(raw):
        lora = read_kohya_lora(raw, where)
    else:
        lora = _read_dotted(raw, adapter_settings(metadata, where), where)
    return lora, metadata


def _read_dotted(raw: Mapping[str, torch.Tensor], settings: Mapping[str, Any], where: str) -> StateDict:
    modules: dict[str, dict[str, torch.Tensor]] = {}
    keys: dict[str, LoraKey] = {}
    for key, tensor in raw.items():
        try:
            parsed = parse_key(key)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        name = f"{parsed.component}.{parsed.module}"
        parts, keys[name] = modules.setdefault(name, {}), parsed
        if parsed.part in parts:
            raise ValueError(
                f"{where} must hold one {parsed.part} for every module, got several for {name!r}, the "
                f"second as {key!r}."
            )
        parts[parsed.part] = tensor
    result: StateDict = {}
    for name, parts in modules.items():
        check_pair(name, parts, where)
        scale = _scale(keys[name], parts, settings, where)
        result[f"{name}.lora_A.weight"] = parts["A"]
        result[f"{name}.lora_B.weight"] = parts["B"] if scale == 1 else parts["B"] * scale
        if not torch.isfinite(result[f"{name}.lora_B.weight"]).all():
            raise ValueError(f"{where}: B times its scale {scale:g} must be finite, got {name!r}.")
    return result


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


def _scale(key: LoraKey, parts: Mapping[str, torch.Tensor], settings: Mapping[str, Any], where: str) -> float:
    """`alpha / rank`, from the tensor beside A and B, else from the adapter's metadata, else 1."""
    rank = parts["A"].shape[0]

    def setting(pattern: str, usual: str) -> float:
        patterns = settings.get(f"{key.component}.{pattern}") or {}
        default = settings.get(f"{key.component}.{usual}", rank)
        return patterns.get(get_pattern_key(patterns, key.written), default)

    check_rank(key.written, rank, setting("rank_pattern", "r"), where)
    if "alpha" in parts:
        return parts["alpha"].item() / rank
    alpha = setting("alpha_pattern", "lora_alpha")
    return alpha / (rank**0.5 if settings.get(f"{key.component}.use_rslora") else rank)


def check_loaded_lora(pipeline: DiffusionPipeline, adapter_name: str | None = None) -> int:
    """Raise `ValueError` unless a LoRA loaded in the pipeline changes at least one weight.

    Args:
        adapter_name: which one; `None` asks for any.

    Returns:
        The number of modules that the LoRA changes.
    """
    changed = 0
    for component in pipeline.components.values():
        if not isinstance(component, torch.nn.Module):
            continue
        for module in component.modules():
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
) -> StateDict:
    """Write a LoRA for diffusers, or with the key names of ComfyUI, A1111 and kohya.

    The metadata of the file that was read (trigger words, base model, author) goes along. What depends on the tensors
    (rank, alpha, hashes) is written anew.

    Args:
        metadata: further entries of the file's metadata, over those of the file that was read.

    Raises:
        ValueError: unknown format, a LoRA without effect, or a key that has no counterpart.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {FORMATS}, got {format!r}.")
    check_output_path(output_path)
    lora, found = read_lora_file(path)
    check_lora_effect(lora)
    exported = lora if format == "diffusers" else to_kohya_lora(lora)
    if output_path is not None:
        kept = {**kept_metadata(found), **(metadata or {})}
        kept.setdefault("modelspec.title", Path(output_path).stem)
        write_lora(exported, output_path, lora_metadata(lora, exported, kept))
    return exported


def add_kohya_file(folder: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> Path:
    """Write the LoRA of a folder once more, as `comfyui_a1111_kohya.safetensors`.

    Those programs know none of the names in `pytorch_lora_weights.safetensors` and would load it without any effect;
    diffusers goes on loading that one. Both files get the metadata.
    """
    source, target = Path(folder, LORA_WEIGHT_NAME), Path(folder, KOHYA_NAME)
    metadata = {"modelspec.title": "LoRA", **(metadata or {})}
    export_lora(source, "kohya", target, metadata=metadata)
    tensors, found = read_tensors(source)
    found.pop(DIGEST_KEY, None)
    write_lora(tensors, source, {**found, **metadata})
    return target


def check_output_path(output_path: str | os.PathLike | None) -> None:
    """Raise `ValueError` for a file to write that is no safetensors file; `None` passes."""
    if output_path is not None and Path(output_path).suffix != ".safetensors":
        raise ValueError(f"`output_path` must end in .safetensors, got {output_path}.")


def write_lora(lora: StateDict, output_path: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> None:
    """Write a LoRA file, whole or not at all; its folder is made when absent.

    Equal LoRAs are equal files. A digest in the metadata finds what is altered later.
    """
    Path(output_path).parent.mkdir(parents=True, exist_ok=True)
    contiguous = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in lora.items()
    }
    write_atomically(output_path, sealed(contiguous, {**(metadata or {}), "format": "pt"}))
