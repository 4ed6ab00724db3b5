"""Which names of modules ComfyUI and A1111 look for in a LoRA file, as facts read in their public source.

ComfyUI (`comfy/lora.py`, 2026) makes a map of names from the loaded model; a key of the file counts if it is one of
them followed by one of its endings. A1111 (`extensions-builtin/Lora/networks.py`, 1.10) cuts a key at its first dot
and looks up the first part, after it has counted blocks as the model's authors do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

COMFYUI_ENDINGS = (
    ".lora_up.weight", ".lora_down.weight", ".lora.up.weight", ".lora.down.weight",
    "_lora.up.weight", "_lora.down.weight", ".lora_A.weight", ".lora_B.weight",
    ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", ".alpha",
)  # fmt: skip
# Blocks with attention in the published models: diffusers' name, transformer blocks in each.
ATTENTIONS = {
    "sd": {
        **{f"down_blocks.{i}.attentions.{j}": 1 for i in range(3) for j in range(2)},
        "mid_block.attentions.0": 1,
        **{f"up_blocks.{i}.attentions.{j}": 1 for i in range(1, 4) for j in range(3)},
    },
    "sdxl": {
        **{f"down_blocks.{i}.attentions.{j}": d for i, d in ((1, 2), (2, 10)) for j in range(2)},
        "mid_block.attentions.0": 10,
        **{f"up_blocks.{i}.attentions.{j}": d for i, d in ((0, 10), (1, 2)) for j in range(3)},
    },
}
# The same blocks by the number that the authors gave them.
OWN_BLOCKS = {
    "sd": {"input": {1, 2, 4, 5, 7, 8}, "output": set(range(3, 12))},
    "sdxl": {"input": {4, 5, 7, 8}, "output": set(range(6))},
}
LINEARS = (
    *(f"{attention}.{linear}" for attention in ("attn1", "attn2")
      for linear in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj", "ff.net.2",
)  # fmt: skip
TEXT_LINEARS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2",
)  # fmt: skip
TEXT_LAYERS = {"sd": (12,), "sdxl": (12, 32)}
_TEXT_PREFIXES = {"sd": ("lora_te_",), "sdxl": ("lora_te1_", "lora_te2_")}


def unet_linears(model: str) -> list[str]:
    """Diffusers' names of the Linears in the attention blocks of the published UNet."""
    inside = [
        f"{attention}.transformer_blocks.{block}.{linear}"
        for attention, depth in ATTENTIONS[model].items()
        for block in range(depth)
        for linear in LINEARS
    ]
    return [*inside, *(f"{a}.{name}" for a in ATTENTIONS[model] for name in ("proj_in", "proj_out"))]


def text_linears(model: str) -> list[tuple[str, str]]:
    """(component of diffusers, name in it) of the Linears of the published text encoders."""
    return [
        (component, f"text_model.encoder.layers.{layer}.{linear}")
        for component, layers in zip(("text_encoder", "text_encoder_2"), TEXT_LAYERS[model])
        for layer in range(layers)
        for linear in TEXT_LINEARS
    ]


def comfyui_names(unet: Iterable[str], text: Iterable[tuple[str, str]]) -> set[str]:
    """The map that ComfyUI makes for SD and SDXL."""
    names = set()
    for module in unet:
        flat = module.replace(".", "_")
        processor = module.replace(".to_", ".processor.to_").removesuffix(".0")
        if not module.endswith(".to_out.0"):
            processor = module.replace(".to_", ".processor.to_")
        names |= {f"lora_unet_{flat}", f"lycoris_{flat}", processor, f"unet.{processor}"}
    for component, module in text:
        flat = module.replace(".", "_")
        names.add(f"{component}.{module}")
        if component == "text_encoder":
            names |= {f"lora_te_{flat}", f"lora_te1_{flat}"}
        else:
            names.add(f"lora_te2_{flat}")
    return names


def comfyui_knows(key: str, names: set[str]) -> bool:
    """Whether ComfyUI would use a key of a LoRA file."""
    return any(key.endswith(end) and key.removesuffix(end) in names for end in COMFYUI_ENDINGS)


def a1111_knows(key: str, model: str) -> bool:
    """Whether A1111 would use a key of a LoRA file."""
    name = key.partition(".")[0]
    if re.fullmatch(r"lora_unet_mid_block_attentions_0_\w+", name):
        return True
    found = re.fullmatch(r"lora_unet_(down|up)_blocks_(\d)_attentions_(\d)_\w+", name)
    if found:
        block, number = int(found[2]), int(found[3])
        if found[1] == "down":
            return 1 + 3 * block + number in OWN_BLOCKS[model]["input"]
        return 3 * block + number in OWN_BLOCKS[model]["output"]
    return any(re.fullmatch(rf"{prefix}text_model_encoder_layers_\d+_\w+", name) for prefix in _TEXT_PREFIXES[model])
