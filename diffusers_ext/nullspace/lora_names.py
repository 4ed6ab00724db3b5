"""Names in LoRA files: which module of which component a key belongs to, in all spellings.

What is written never depends on the installed transformers: CLIP encoders keep their `.text_model`,
which `CLIPTextModelWithProjection` has in every version, and which diffusers takes off where an
encoder has none. ComfyUI and A1111 know CLIP's layers by that name alone.
"""

from __future__ import annotations

import re
from typing import NamedTuple


# Ends of keys, as diffusers and PEFT have written them over the years; PEFT's own may name the adapter.
_SUFFIX = re.compile(
    r"\.(?:lora_(?P<peft>[AB])(?:\.[\w-]+)?\.weight"
    r"|lora(?:_linear_layer)?\.(?P<diffusers>down|up)\.weight"
    r"|lora_(?P<kohya>down|up)\.weight"
    r"|(?P<alpha>alpha))$"
)
_OLD_SUFFIX = re.compile(r"\.(?P<linear>to_\w+)_lora\.(?P<part>down|up)\.weight$")
_COMPONENT = re.compile(r"(unet|transformer|text_encoder)(_\d)?")
_PEFT_WRAPPER = "base_model.model."
_ORIGINAL_NAMES = ("diffusion_model.", "model.diffusion_model.")
# First parts of names inside transformers and CLIP text encoders; all others are a UNet's.
_TRANSFORMER_ROOTS = {
    "transformer_blocks", "single_transformer_blocks", "joint_transformer_blocks", "blocks",
    "context_embedder", "x_embedder",
}  # fmt: skip
_TEXT_ROOTS = ("text_model.", "encoder.layers.")
_FLAT_CLIP = re.compile(r"^encoder\.layers\.")
_OLD_TEXT_LINEARS = {
    "to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj",
}  # fmt: skip
SPELLINGS = (
    ".lora_A.weight", ".lora_B.weight", ".lora.down.weight", ".lora.up.weight",
    ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", ".alpha",
)  # fmt: skip


class LoraKey(NamedTuple):
    """One key of a LoRA file."""

    component: str  # "unet", "transformer", "text_encoder", "text_encoder_2", ...
    module: str  # dotted name inside it
    part: str  # "A", "B" or "alpha"
    written: str  # the component's module as the file names it, which is how its metadata do


def parse_key(key: str) -> LoraKey:
    """What a key stands for.

    Names of a model wrapped by PEFT (`base_model.model.`), bare names, and those of attention
    processors (`...attn2.processor.to_k_lora.down.weight`) are read too.
    """
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
    found = _SUFFIX.search(key)
    if found:
        part = found["peft"] or found["diffusers"] or found["kohya"] or found["alpha"]
        return key[: found.start()], {"down": "A", "up": "B"}.get(part, part)
    found = _OLD_SUFFIX.search(key)
    if found:
        linear = found["linear"]
        if ".processor." not in key:
            linear = _OLD_TEXT_LINEARS.get(linear, linear)
        return f"{key[: found.start()]}.{linear}", "A" if found["part"] == "down" else "B"
    hint = " DoRA is not supported." if "magnitude" in key or "dora" in key else ""
    raise ValueError(
        f"Every key of a LoRA must end in one of {sorted(SPELLINGS)}, got {key!r}.{hint}"
    )


def _component(name: str) -> tuple[str, str]:
    name = name.removeprefix(_PEFT_WRAPPER)
    first, _, rest = name.partition(".")
    if _COMPONENT.fullmatch(first) and rest:
        return first, rest.removeprefix(_PEFT_WRAPPER)
    if name.startswith(_ORIGINAL_NAMES):
        raise ValueError(
            f"Every module of a LoRA must be named as in diffusers or kohya's scripts, got {name!r}, a "
            "name of the model's original code."
        )
    if name.startswith(_TEXT_ROOTS):
        return "text_encoder", name
    return ("transformer" if first in _TRANSFORMER_ROOTS else "unet"), name
