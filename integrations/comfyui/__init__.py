"""Nodes of ComfyUI for diffusers_ext: golden noise, LoRAs with a dial, erasers."""

from .debleed_lora import DebleedLora
from .golden_noise import GoldenNoise
from .load_eraser import LoadEraser

NODE_CLASS_MAPPINGS = {
    "DiffusersExtGoldenNoise": GoldenNoise,
    "DiffusersExtDebleedLora": DebleedLora,
    "DiffusersExtLoadEraser": LoadEraser,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DiffusersExtGoldenNoise": "Golden Noise",
    "DiffusersExtDebleedLora": "Debleed LoRA",
    "DiffusersExtLoadEraser": "Load Eraser",
}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
