"""LoRAs with the key names of kohya's scripts, as A1111 and ComfyUI share them, read into diffusers' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft


_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
# Where SDXL's blocks are counted as its authors did; the only family with such names.
_SDXL = SimpleNamespace(layers_per_block=2)


def is_kohya_lora(keys: Iterable[str]) -> bool:
    """Whether all keys of a file are kohya's."""
    return all(key.startswith(_PREFIXES) for key in keys)


def read_kohya_lora(raw: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same LoRA with keys `<component>.<module>.lora_A.weight | .lora_B.weight`, of scale 1.

    Args:
        raw: `lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    Raises:
        ValueError: other kinds of adapters (DoRA, LoHa, LoKr), an A without its B, or a module
            that has no name in diffusers.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in raw.items():
        name, _, part = key.partition(".")
        if part not in _PARTS:
            raise ValueError(f"Every key of a kohya LoRA must end in one of {_PARTS}, got {key!r}.")
        modules.setdefault(name, {})[part] = tensor
    folded: dict[str, torch.Tensor] = {}
    for name, parts in modules.items():
        if not {*_PARTS[:2]} <= parts.keys():
            raise ValueError(
                f"Every module of a LoRA must have A and B, got {list(parts)} of {name!r}."
            )
        down, up = (parts[part] for part in _PARTS[:2])
        scale = parts["alpha"].item() / down.shape[0] if "alpha" in parts else 1.0
        folded[f"{name}.lora_down.weight"], folded[f"{name}.lora_up.weight"] = down, up * scale
    renamed, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(folded, unet_config=_SDXL)
    unet = {key: tensor for key, tensor in renamed.items() if key.startswith("unet.")}
    text = {key: tensor for key, tensor in renamed.items() if key not in unet}
    lora = convert_unet_state_dict_to_peft(unet) | (
        convert_state_dict_to_peft(text) if text else {}
    )
    if len(lora) != 2 * len(modules):
        raise ValueError(
            f"Every module of the LoRA must have a name in diffusers, got {len(lora) // 2} of "
            f"{len(modules)}."
        )
    # As diffusers names the parts of newer text encoders, which lack that wrapper.
    return {key.replace(".text_model.encoder.", ".encoder."): lora[key] for key in lora}
