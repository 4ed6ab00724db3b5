"""LoRA files: read them module by module, project them, write them for diffusers or ComfyUI/kohya."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.nullspace.projector import NullSpaceProjector, project_rows
from diffusers_ext.nullspace.statistics import FeatureStatistics


LORA_WEIGHT_NAME = "pytorch_lora_weights.safetensors"
FORMATS = ("diffusers", "kohya")
StateDict = dict[str, torch.Tensor]
# Spellings of one thing in LoRA files that diffusers has written over the years.
_SUFFIXES = {
    ".lora_A.weight": ".lora_A.weight",
    ".lora_B.weight": ".lora_B.weight",
    ".lora.down.weight": ".lora_A.weight",
    ".lora.up.weight": ".lora_B.weight",
    ".lora_linear_layer.down.weight": ".lora_A.weight",
    ".lora_linear_layer.up.weight": ".lora_B.weight",
    ".alpha": ".alpha",
}


def read_lora(source: str | os.PathLike | Mapping[str, torch.Tensor]) -> StateDict:
    """A LoRA with keys `<component>.<module>.lora_A.weight | .lora_B.weight`, of scale 1.

    A scale other than 1 (an `.alpha` entry, or `lora_alpha` in the file's metadata) is folded into B.

    Args:
        source: a safetensors file, a folder with `pytorch_lora_weights.safetensors`, or a state dict.

    Raises:
        ValueError: no such file, a key that is not of a LoRA, an A without its B, DoRA.
    """
    raw, metadata = _load(source)
    modules: dict[str, StateDict] = {}
    for key, tensor in raw.items():
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            hint = " DoRA is not supported." if "magnitude" in key or "dora" in key else ""
            raise ValueError(
                f"Every key of a LoRA must end in one of {sorted(_SUFFIXES)}, got {key!r}.{hint}"
            )
        name = key.removesuffix(suffix)
        modules.setdefault(name, {})[_SUFFIXES[suffix]] = tensor
    result: StateDict = {}
    for name, parts in modules.items():
        if ".lora_A.weight" not in parts or ".lora_B.weight" not in parts:
            raise ValueError(
                f"Every module of a LoRA must have A and B, got {list(parts)} for {name!r}."
            )
        a, b = parts[".lora_A.weight"], parts[".lora_B.weight"]
        scale = _scale(name, a.shape[0], parts.get(".alpha"), metadata)
        result[f"{name}.lora_A.weight"], result[f"{name}.lora_B.weight"] = a, b * scale
    if not result:
        raise ValueError("`source` must hold a LoRA, got no tensors.")
    return result


def _load(
    source: str | os.PathLike | Mapping[str, torch.Tensor],
) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
    if isinstance(source, Mapping):
        return source, {}
    path = Path(source)
    path = path / LORA_WEIGHT_NAME if path.is_dir() else path
    if not path.is_file() or path.suffix != ".safetensors":
        raise ValueError(
            f"`source` must be a .safetensors file or a folder with one, got {source}."
        )
    with safe_open(path, "pt") as handle:
        metadata = json.loads((handle.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    return load_file(path), metadata


def _scale(name: str, rank: int, alpha: torch.Tensor | None, metadata: dict[str, Any]) -> float:
    """`alpha / rank`, from the tensor beside A and B, else from the adapter's metadata, else 1."""
    if alpha is not None:
        return alpha.item() / rank
    component, _, module = name.partition(".")
    patterns = metadata.get(f"{component}.alpha_pattern") or {}
    usual = metadata.get(f"{component}.lora_alpha", rank)
    value = patterns.get(get_pattern_key(patterns, module), usual)
    return value / (rank**0.5 if metadata.get(f"{component}.use_rslora") else rank)


def check_lora_effect(lora: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError` if every update `B A` of a LoRA is zero."""
    for key, a in lora.items():
        if key.endswith(".lora_A.weight"):
            b = lora[key.replace(".lora_A.", ".lora_B.")]
            if a.any() and b.any():
                return
    raise ValueError("A LoRA must have an effect, got zero in every update. Was it trained?")


def check_loaded_lora(pipeline: DiffusionPipeline, adapter_name: str | None = None) -> int:
    """Raise `ValueError` unless a LoRA loaded in the pipeline changes at least one weight.

    Args:
        pipeline: with LoRAs loaded by `load_lora_weights`.
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
                names = (
                    module.lora_B if adapter_name is None else {adapter_name} & set(module.lora_B)
                )
                changed += any(
                    bool(module.lora_A[name].weight.any() and module.lora_B[name].weight.any())
                    for name in names
                )
    if not changed:
        raise ValueError(
            f"The loaded LoRA must change the model, got no effect (adapter: {adapter_name!r}). Its keys "
            "do not match this model, or it was never trained."
        )
    return changed


def export_lora(
    path: str | os.PathLike,
    format: str = "diffusers",
    output_path: str | os.PathLike | None = None,
) -> StateDict:
    """Write a LoRA for diffusers, or with the key names of ComfyUI, A1111 and kohya.

    Args:
        path: LoRA to read, as in `read_lora`.
        format: `"diffusers"` or `"kohya"`.
        output_path: file to write; `None` only returns the state dict.

    Raises:
        ValueError: unknown format, a LoRA without effect, or a key that has no counterpart.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {FORMATS}, got {format!r}.")
    _check_output_path(output_path)
    lora = read_lora(path)
    check_lora_effect(lora)
    exported = lora if format == "diffusers" else _to_kohya(lora)
    if output_path is not None:
        _write(exported, output_path)
    return exported


def _check_output_path(output_path: str | os.PathLike | None) -> None:
    if output_path is not None and Path(output_path).suffix != ".safetensors":
        raise ValueError(f"`output_path` must end in .safetensors, got {output_path}.")


def _write(lora: StateDict, output_path: str | os.PathLike) -> None:
    Path(output_path).parent.mkdir(parents=True, exist_ok=True)
    contiguous = {key: tensor.contiguous() for key, tensor in lora.items()}
    write_atomically(output_path, save(contiguous, metadata={"format": "pt"}))


def _to_kohya(lora: StateDict) -> StateDict:
    exported = convert_state_dict_to_kohya(lora)
    two_encoders = any(key.startswith("text_encoder_2.") for key in lora)
    if not two_encoders:  # one text encoder is `te`, two are `te1` and `te2`
        exported = {key.replace("lora_te1_", "lora_te_"): value for key, value in exported.items()}
    weights = [key for key in exported if not key.endswith(".alpha")]
    strange = [key for key in weights if not key.startswith(("lora_unet_", "lora_te"))]
    if strange or len(weights) != len(lora):
        raise ValueError(
            f"Every LoRA key must have a kohya counterpart, got {len(weights)} for {len(lora)} "
            f"(without one: {strange[:3]})."
        )
    return exported


def debleed_lora(
    lora: str | os.PathLike | Mapping[str, torch.Tensor],
    statistics: FeatureStatistics,
    *,
    projector: NullSpaceProjector | None = None,
    uncovered: str = "error",
    output_path: str | os.PathLike | None = None,
    **criterion: float,
) -> StateDict:
    """Take out of an existing LoRA what acts on preserved inputs: `A <- A P`, without training.

    Args:
        lora: as in `read_lora`, for the model that `statistics` were collected on.
        statistics: of the prompts to protect.
        projector: ready projector, in place of `criterion`.
        uncovered: what to do with modules that have no statistic: `"error"`, `"keep"`, `"drop"`.
        output_path: file to write in diffusers format; `None` only returns the state dict.
        criterion: one of `NullSpaceProjector.from_statistics`, e.g. `damping=1e-3`, `energy=1e-4`.

    Returns:
        The projected LoRA, keys as in `read_lora`, dtypes as they were.
    """
    if uncovered not in ("error", "keep", "drop"):
        raise ValueError(f"`uncovered` must be 'error', 'keep' or 'drop', got {uncovered!r}.")
    _check_output_path(output_path)
    if (projector is None) != bool(criterion):
        raise ValueError("Either `projector` or one criterion must be given, got neither or both.")
    projector = projector or NullSpaceProjector.from_statistics(statistics, **criterion)
    projections = projector.projections()
    result: StateDict = {}
    missing = []
    for key, tensor in read_lora(lora).items():
        component, _, name = key.rsplit(".lora_", 1)[0].partition(".")
        linear = name if component in ("unet", "transformer") else None
        if linear in projections:
            is_a = key.endswith(".lora_A.weight")
            result[key] = project_rows(tensor, projections[linear]) if is_a else tensor
        else:
            missing.append(key)
            if uncovered == "keep":
                result[key] = tensor
    if missing and uncovered == "error":
        raise ValueError(
            f"`statistics` must cover every module of the LoRA, got none for {len(missing) // 2}, the "
            f"first is {missing[0]!r}. Collect more features, or pass uncovered='keep' or 'drop'."
        )
    check_lora_effect(result)
    if output_path is not None:
        _write(result, output_path)
    return result
