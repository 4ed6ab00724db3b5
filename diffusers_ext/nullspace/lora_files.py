"""LoRA files: read them module by module, check them, write them for diffusers or ComfyUI/kohya."""

from __future__ import annotations

import json
import os
import re
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
from diffusers_ext.nullspace.kohya_lora import is_kohya_lora, read_kohya_lora


LORA_WEIGHT_NAME = "pytorch_lora_weights.safetensors"
FORMATS = ("diffusers", "kohya")
StateDict = dict[str, torch.Tensor]
_FLAT_ENCODER = re.compile(r"^(text_encoder(?:_2)?)\.encoder\.")
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
    Names of kohya's scripts become those of diffusers.

    Args:
        source: a safetensors file, a folder with `pytorch_lora_weights.safetensors`, or a state dict.

    Raises:
        ValueError: no such file, a key that is not of a LoRA, an A without its B, DoRA.
    """
    raw, metadata = _load(source)
    if raw and is_kohya_lora(raw):
        return read_kohya_lora(raw)
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
    check_output_path(output_path)
    lora = read_lora(path)
    check_lora_effect(lora)
    exported = lora if format == "diffusers" else _to_kohya(lora)
    if output_path is not None:
        write_lora(exported, output_path)
    return exported


def check_output_path(output_path: str | os.PathLike | None) -> None:
    """Raise `ValueError` for a file to write that is no safetensors file; `None` passes."""
    if output_path is not None and Path(output_path).suffix != ".safetensors":
        raise ValueError(f"`output_path` must end in .safetensors, got {output_path}.")


def write_lora(lora: StateDict, output_path: str | os.PathLike) -> None:
    """Write a LoRA file, whole or not at all; its folder is made when absent."""
    Path(output_path).parent.mkdir(parents=True, exist_ok=True)
    contiguous = {key: tensor.contiguous() for key, tensor in lora.items()}
    write_atomically(output_path, save(contiguous, metadata={"format": "pt"}))


def _to_kohya(lora: StateDict) -> StateDict:
    # Newer text encoders lack a wrapper whose name the other programs expect.
    named = {_FLAT_ENCODER.sub(r"\1.text_model.encoder.", key): lora[key] for key in lora}
    exported = convert_state_dict_to_kohya(named)
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
    return _with_one_alpha(exported)


def _with_one_alpha(lora: StateDict) -> StateDict:
    """The same updates with one alpha for all modules: diffusers misreads several."""
    alphas = {key: tensor for key, tensor in lora.items() if key.endswith(".alpha")}
    largest = max(alphas.values())
    scaled = dict(lora)
    for key, alpha in alphas.items():
        up = key.replace(".alpha", ".lora_up.weight")
        scaled[key], scaled[up] = largest.clone(), lora[up] * (alpha / largest).item()
    return scaled
