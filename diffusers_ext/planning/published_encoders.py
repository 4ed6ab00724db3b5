"""Shapes of the text encoders and VAEs that the published base models share."""

from __future__ import annotations

from typing import Any

from diffusers_ext.eraser.component_memory import PUBLISHED_TEXT_ENCODER
from diffusers_ext.planning.base_model import Component


_VAE_BLOCKS: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAE = Component("AutoencoderKL", _VAE_BLOCKS)
SDXL_VAE = Component("AutoencoderKL", {**_VAE_BLOCKS, "force_upcast": True})
VAE_16 = Component(
    "AutoencoderKL",
    {
        **_VAE_BLOCKS,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
)
_CLIP_L_CONFIG: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
CLIP_L = Component("CLIPTextModel", _CLIP_L_CONFIG)
CLIP_L_PROJECTION = Component("CLIPTextModelWithProjection", _CLIP_L_CONFIG)
CLIP_BIG_G = Component(
    "CLIPTextModelWithProjection",
    {
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
)
OPEN_CLIP_H = Component(
    "CLIPTextModel",
    {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
)
T5_XXL = Component("T5EncoderModel", PUBLISHED_TEXT_ENCODER)
MT5_XL = Component(
    "T5EncoderModel",
    {
        **PUBLISHED_TEXT_ENCODER,
        "d_model": 2048,
        "d_ff": 5120,
        "num_heads": 32,
        "vocab_size": 250112,
    },
)
BERT_L = Component(
    "BertModel",
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "vocab_size": 47020,
    },
)
SAFETY_CHECKER = Component(
    "StableDiffusionSafetyChecker",
    {
        "projection_dim": 768,
        "text_config": {"hidden_size": 768},
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
    },
)
