"""LoRAs with the key names of kohya's scripts, as A1111 and ComfyUI share them: read and written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

from diffusers_ext.nullspace.lora_checks import check_pair


_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
# Where SDXL's blocks are counted as its authors did; the only family with such names.
_SDXL = SimpleNamespace(layers_per_block=2)


def is_kohya_lora(keys: Iterable[str]) -> bool:
    """Whether all keys of a file are kohya's."""
    return all(key.startswith(_PREFIXES) for key in keys)


def read_kohya_lora(
    raw: Mapping[str, torch.Tensor], where: str = "`raw`"
) -> dict[str, torch.Tensor]:
    """The same LoRA with keys `<component>.<module>.lora_A.weight | .lora_B.weight`, of scale 1.

    Args:
        raw: `lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in raw.items():
        name, _, part = key.partition(".")
        if part not in _PARTS:
            raise ValueError(
                f"{where}: every key of a kohya LoRA must end in one of {tuple(_PARTS)}, got {key!r}."
            )
        modules.setdefault(name, {})[_PARTS[part]] = tensor
    folded: dict[str, torch.Tensor] = {}
    for name, parts in modules.items():
        check_pair(name, parts, where)
        scale = parts["alpha"].item() / parts["A"].shape[0] if "alpha" in parts else 1.0
        up = parts["B"] if scale == 1 else parts["B"] * scale
        if not torch.isfinite(up).all():
            raise ValueError(f"{where}: B times its scale {scale:g} must be finite, got {name!r}.")
        folded[f"{name}.lora_down.weight"], folded[f"{name}.lora_up.weight"] = parts["A"], up
    renamed, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(folded, unet_config=_SDXL)
    unet = {key: tensor for key, tensor in renamed.items() if key.startswith("unet.")}
    text = {key: tensor for key, tensor in renamed.items() if key not in unet}
    lora = convert_unet_state_dict_to_peft(unet) | (
        convert_state_dict_to_peft(text) if text else {}
    )
    if len(lora) != 2 * len(modules):
        raise ValueError(
            f"{where}: every module of the LoRA must have a name in diffusers, got {len(lora) // 2} of "
            f"{len(modules)}."
        )
    return lora


def has_kohya_names(lora: Iterable[str]) -> bool:
    """Whether all modules of a LoRA, as `read_lora` names them, have a name in kohya's scripts."""
    return all(key.startswith(("unet.", "text_encoder.", "text_encoder_2.")) for key in lora)


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
