"""What LoRA files hold: names of modules in all spellings, kohya's among them, and checks of every pair.

What is written never depends on the installed transformers: CLIP encoders keep their `.text_model`, which
`CLIPTextModelWithProjection` has in every version, and which diffusers takes off where an encoder has none. ComfyUI
and A1111 know CLIP's layers by that name alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType, convert_state_dict_to_kohya
from peft.utils.other import get_pattern_key

from diffusers_ext.core.tensor_files import FLOATING, check_tensors

_REMEDY = "Download or train it again."
_DIMENSIONS = range(2, 6)  # of a Linear's weight to a 3-D convolution's
# PEFT takes keys of these settings as regular expressions. One with repetitions of its own could
# keep a loader busy for ever; names, an anchor and one leading `.*` are what PEFT itself writes.
_SAFE_PATTERN = re.compile(r"\^?(\.\*)?(\\?[\w.\-])*\$?")
_PATTERNS = ("alpha_pattern", "rank_pattern")
_NUMBERS = ("lora_alpha", "r")
_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
# Where SDXL's blocks are counted as its authors did; the only family with such names.
_SDXL = SimpleNamespace(layers_per_block=2)
# Ends of keys, as diffusers and PEFT have written them over the years; PEFT's own may name the adapter.
_SUFFIX = re.compile(
    r"\.(?:lora_(?P<peft>[AB])(?:\.[\w-]+)?\.weight"
    r"|lora(?:_linear_layer)?\.(?P<diffusers>down|up)\.weight"
    r"|lora_(?P<kohya>down|up)\.weight"
    r"|(?P<alpha>alpha))$"
)
_OLD_SUFFIX = re.compile(r"\.(?P<linear>to_\w+)_lora\.(?P<part>down|up)\.weight$")
_COMPONENT = re.compile(r"(unet|transformer|connectors|text_encoder)(_\d)?")
_PEFT_WRAPPER = "base_model.model."
_ORIGINAL_NAMES = ("diffusion_model.", "model.diffusion_model.")
# First parts of names inside transformers and CLIP text encoders; all others are a UNet's.
_TRANSFORMER_ROOTS = {
    "transformer_blocks", "single_transformer_blocks", "joint_transformer_blocks", "blocks",
    "context_embedder", "x_embedder",
}  # fmt: skip
_TEXT_ROOTS = ("text_model.", "encoder.layers.")
_T5 = re.compile(r"text_encoder(_(?P<number>\d))?\.(?P<inside>encoder\.block\..+)")
_FLAT_CLIP = re.compile(r"^encoder\.layers\.")
_OLD_TEXT_LINEARS = {
    "to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj",
}  # fmt: skip
_SPELLINGS = (
    ".lora_A.weight", ".lora_B.weight", ".lora.down.weight", ".lora.up.weight",
    ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", ".alpha",
)  # fmt: skip


def _adapter_settings(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """The settings of PEFT's adapters that diffusers keeps in a file's metadata, checked."""
    text = metadata.get(LORA_ADAPTER_METADATA_KEY)
    if not text:
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} must hold JSON as {LORA_ADAPTER_METADATA_KEY!r} of its metadata, got: {error}. {_REMEDY}"
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{where} must hold a JSON object as {LORA_ADAPTER_METADATA_KEY!r} of its metadata, got a "
            f"{type(settings).__name__}. {_REMEDY}"
        )
    for name, value in settings.items():
        kind = name.rpartition(".")[2]
        if kind in _NUMBERS:
            _check_number(name, value, where)
        elif kind in _PATTERNS and value:
            if not isinstance(value, dict):
                raise ValueError(f"{where} must hold names and numbers as {name!r}, got {value!r}.")
            for pattern, number in value.items():
                if not _SAFE_PATTERN.fullmatch(pattern):
                    raise ValueError(
                        f"{where} must hold module names in {name!r}, got the pattern {pattern!r}. {_REMEDY}"
                    )
                _check_number(name, number, where)
    return settings


def _check_number(name: str, value: Any, where: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"{where} must hold a finite number as {name!r}, got {value!r}. {_REMEDY}")


def _check_pair(name: str, parts: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise `ValueError` unless A `(rank, in, ...)`, B `(out, rank, ...)` and alpha, where there is one, fit."""
    if "A" not in parts or "B" not in parts:
        raise ValueError(
            f"{where}: every module of a LoRA must have A and B, got {sorted(parts)} for {name!r}. {_REMEDY}"
        )
    tensors = {f"{name}.{part}": tensor for part, tensor in parts.items()}
    weights = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    check_tensors(weights, where, dtypes=FLOATING, remedy=_REMEDY)
    check_tensors(tensors, where, remedy=_REMEDY)
    a, b = parts["A"], parts["B"]
    shapes = f"A of shape {tuple(a.shape)} and B of shape {tuple(b.shape)} for {name!r}"
    if a.ndim not in _DIMENSIONS or b.ndim != a.ndim:
        raise ValueError(
            f"{where}: A and B of a LoRA must both be of a Linear (2 dimensions) or both of a "
            f"convolution (4), got {shapes}. {_REMEDY}"
        )
    if not a.numel() or not b.numel() or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{where}: A and B of a LoRA must have one rank, A `(rank, in)` and B `(out, rank)`, got "
            f"{shapes}. {_REMEDY}"
        )
    if any(side != 1 for side in b.shape[2:]):
        raise ValueError(f"{where}: B of a convolution's LoRA must be 1 x 1, got {shapes}. {_REMEDY}")
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise ValueError(f"{where}: alpha must be one number, got {parts['alpha'].numel()} for {name!r}. {_REMEDY}")


def check_lora_effect(lora: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError` if every update `B A` of a LoRA is zero."""
    for key, a in lora.items():
        if key.endswith(".lora_A.weight"):
            b = lora[key.replace(".lora_A.", ".lora_B.")]
            if a.any() and b.any():
                return
    raise ValueError("A LoRA must have an effect, got zero in every update. Was it trained?")


def is_kohya_lora(keys: Iterable[str]) -> bool:
    """Whether all keys of a file are kohya's."""
    return all(key.startswith(_PREFIXES) for key in keys)


def is_foreign_name(key: str) -> bool:
    """Whether a key is that of ComfyUI or of kohya's scripts; diffusers has converters by family of transformers."""
    return key.startswith((*_ORIGINAL_NAMES, *_PREFIXES))


def read_kohya_lora(raw: Mapping[str, torch.Tensor], where: str = "`raw`") -> dict[str, torch.Tensor]:
    """A LoRA of `lora_unet_<module>.{lora_down.weight, lora_up.weight, alpha}` as `read_lora` names it, of scale 1."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in raw.items():
        name, _, part = key.partition(".")
        if part not in _PARTS:
            raise ValueError(f"{where}: every key of a kohya LoRA must end in one of {tuple(_PARTS)}, got {key!r}.")
        modules.setdefault(name, {})[_PARTS[part]] = tensor
    folded: dict[str, torch.Tensor] = {}
    for name, parts in modules.items():
        _check_pair(name, parts, where)
        scale = parts["alpha"].item() / parts["A"].shape[0] if "alpha" in parts else 1.0
        folded[f"{name}.lora_down.weight"] = parts["A"]
        folded[f"{name}.lora_up.weight"] = _scaled(name, parts["B"], scale, where)
    renamed, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(folded, unet_config=_SDXL)
    unet = {key: tensor for key, tensor in renamed.items() if key.startswith("unet.")}
    text = {key: tensor for key, tensor in renamed.items() if key not in unet}
    # By its name, because diffusers guesses it from the presence of `out_proj`.
    text = convert_state_dict_to_peft(text, original_type=StateDictType.DIFFUSERS_OLD) if text else {}
    lora = convert_unet_state_dict_to_peft(unet) | text
    if len(lora) != 2 * len(modules):
        raise ValueError(
            f"{where}: every module of the LoRA must have a name in diffusers, got {len(lora) // 2} of {len(modules)}."
        )
    return lora


def read_dotted_lora(
    raw: Mapping[str, torch.Tensor], metadata: Mapping[str, str], where: str
) -> dict[str, torch.Tensor]:
    """A LoRA of any other spelling as `read_lora` names it, of scale 1; `metadata` tell scales without an alpha."""
    settings = _adapter_settings(metadata, where)
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
    result: dict[str, torch.Tensor] = {}
    for name, parts in modules.items():
        _check_pair(name, parts, where)
        scale = _scale(keys[name], parts, settings, where)
        result[f"{name}.lora_A.weight"] = parts["A"]
        result[f"{name}.lora_B.weight"] = _scaled(name, parts["B"], scale, where)
    return result


def _scaled(name: str, b: torch.Tensor, scale: float, where: str) -> torch.Tensor:
    b = b if scale == 1 else b * scale
    if not torch.isfinite(b).all():
        raise ValueError(f"{where}: B times its scale {scale:g} must be finite, got {name!r}.")
    return b


def _scale(key: LoraKey, parts: Mapping[str, torch.Tensor], settings: Mapping[str, Any], where: str) -> float:
    """`alpha / rank`, from the tensor beside A and B, else from the adapter's metadata, else 1."""
    rank = parts["A"].shape[0]

    def setting(pattern: str, usual: str) -> float:
        patterns = settings.get(f"{key.component}.{pattern}") or {}
        default = settings.get(f"{key.component}.{usual}", rank)
        return patterns.get(get_pattern_key(patterns, key.written), default)

    expected = setting("rank_pattern", "r")
    if rank != expected:
        raise ValueError(
            f"{where}: the rank of {key.written!r} must be {expected} as in the file's metadata, got {rank}. {_REMEDY}"
        )
    if "alpha" in parts:
        return parts["alpha"].item() / rank
    alpha = setting("alpha_pattern", "lora_alpha")
    return alpha / (rank**0.5 if settings.get(f"{key.component}.use_rslora") else rank)


def has_kohya_names(lora: Iterable[str]) -> bool:
    """Whether all modules of a LoRA, as `read_lora` names them, have a name in kohya's scripts."""
    return all(key.startswith(("unet.", "text_encoder.", "text_encoder_2.")) for key in lora)


def to_comfyui_lora(lora: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The same LoRA with the names of modules that ComfyUI knows; itself where it knows those of diffusers.

    Args:
        names: of the base model, `Family.comfyui_names`.
    """
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in lora.items():
        module, ending, part = key.rpartition(".lora_")
        if found := _T5.fullmatch(module):  # ComfyUI knows T5's by kohya's names alone
            module = f"lora_te{found['number'] or 1}_{found['inside'].replace('.', '_')}"
        for pattern, replacement in names.items():
            module = re.sub(pattern, replacement, module)
        renamed[module + ending + part] = tensor
    return renamed


def to_kohya_lora(lora: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same LoRA with kohya's names, and one alpha for all modules."""
    exported = convert_state_dict_to_kohya(dict(lora))
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
    # One alpha for all modules, B scaled to it: diffusers misreads several.
    alphas = {key: tensor for key, tensor in exported.items() if key.endswith(".alpha")}
    largest = max(alphas.values())
    for key, alpha in alphas.items():
        up = key.replace(".alpha", ".lora_up.weight")
        exported[key], exported[up] = largest.clone(), exported[up] * (alpha / largest).item()
    return exported


class LoraKey(NamedTuple):
    """One key of a LoRA file."""

    component: str  # "unet", "transformer", "connectors", "text_encoder", "text_encoder_2", ...
    module: str  # dotted name inside it
    part: str  # "A", "B" or "alpha"
    written: str  # the component's module as the file names it, which is how its metadata do


def parse_key(key: str) -> LoraKey:
    """What a key stands for; read too are bare names, PEFT's `base_model.model.` and those of attention processors."""
    name, part = _split(key)
    component, name = _component(name)
    written = name
    if ".processor." in name:
        name = name.replace(".processor.", ".")
        name = name + ".0" if name.endswith(".to_out") else name
    if component.startswith("text_encoder"):
        name = _FLAT_CLIP.sub("text_model.encoder.layers.", name)
    return LoraKey(component, name, part, written)


def _split(key: str) -> tuple[str, str]:
    """The name of a module with its component, and "A", "B" or "alpha"."""
    found = _SUFFIX.search(key)
    if found:
        part = found[found.lastgroup]
        return key[: found.start()], {"down": "A", "up": "B"}.get(part, part)
    found = _OLD_SUFFIX.search(key)
    if found:
        linear = found["linear"]
        if ".processor." not in key:
            linear = _OLD_TEXT_LINEARS.get(linear, linear)
        return f"{key[: found.start()]}.{linear}", "A" if found["part"] == "down" else "B"
    hint = " DoRA is not supported." if "magnitude" in key or "dora" in key else ""
    raise ValueError(f"Every key of a LoRA must end in one of {sorted(_SPELLINGS)}, got {key!r}.{hint}")


def _component(name: str) -> tuple[str, str]:
    name = name.removeprefix(_PEFT_WRAPPER)
    first, _, rest = name.partition(".")
    if _COMPONENT.fullmatch(first) and rest:
        return first, rest.removeprefix(_PEFT_WRAPPER)
    if name.startswith(_ORIGINAL_NAMES):
        raise ValueError(
            f"Every module of a LoRA must be named as in diffusers or kohya's scripts, got {name!r}, a name of the "
            "model's original code. Name its pipeline: `diffusers-ext convert lora FILE NEW_FILE --format diffusers "
            "--pipeline WanPipeline`."
        )
    if name.startswith(_TEXT_ROOTS):
        return "text_encoder", name
    return ("transformer" if first in _TRANSFORMER_ROOTS else "unet"), name
