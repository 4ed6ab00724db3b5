"""Published base models as shapes: their components' classes, and what configs say besides defaults.

Read from the `config.json` of each component on the Hub. Wherever the number of parameters is published, the tests
compare it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

# Class name of diffusers or transformers, and what its config says.
Component = tuple[str, Mapping[str, Any]]


class Published(NamedTuple):
    """A base model on the Hub."""

    repository: str
    short_name: str
    components: Mapping[str, Component]  # in the order of the pipeline
    dtype: torch.dtype  # of the published weights
    # Of a pipeline whose denoisers share a run: what its `model_index.json` and its scheduler's config say of that.
    index: Mapping[str, Any] = {}
    scheduler: Component | None = None


_VAE_BLOCKS: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAE: Component = ("AutoencoderKL", _VAE_BLOCKS)
SDXL_VAE: Component = ("AutoencoderKL", {**_VAE_BLOCKS, "force_upcast": True})
VAE_16: Component = (
    "AutoencoderKL",
    {**_VAE_BLOCKS, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
)


FLUX2_VAE: Component = ("AutoencoderKLFlux2", {})


def encoder_sizes(width: int, num_heads: int, num_layers: int) -> dict[str, Any]:
    """Of a CLIP or BERT, whose inner layers are four times as wide."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": num_heads,
        "num_hidden_layers": num_layers,
    }


_CLIP_L_CONFIG = {**encoder_sizes(768, 12, 12), "projection_dim": 768}
CLIP_L: Component = ("CLIPTextModel", _CLIP_L_CONFIG)
CLIP_L_PROJECTION: Component = ("CLIPTextModelWithProjection", _CLIP_L_CONFIG)
CLIP_BIG_G: Component = (
    "CLIPTextModelWithProjection",
    {**encoder_sizes(1280, 20, 32), "hidden_act": "gelu", "projection_dim": 1280},
)
OPEN_CLIP_H: Component = (
    "CLIPTextModel",
    {**encoder_sizes(1024, 16, 23), "hidden_act": "gelu", "projection_dim": 512},
)
_T5_XXL_CONFIG: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
T5_XXL: Component = ("T5EncoderModel", _T5_XXL_CONFIG)
MT5_XL: Component = (
    "T5EncoderModel",
    {**_T5_XXL_CONFIG, "d_model": 2048, "d_ff": 5120, "num_heads": 32, "vocab_size": 250112},
)
UMT5_XXL: Component = ("UMT5EncoderModel", {**_T5_XXL_CONFIG, "vocab_size": 256384})
_QWEN3: dict[str, Any] = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
QWEN3_4B: Component = (
    "Qwen3ForCausalLM",
    {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
)
QWEN3_4B_BODY: Component = ("Qwen3Model", QWEN3_4B[1])
QWEN3_8B: Component = ("Qwen3ForCausalLM", {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288})
# The rest of its config is the class' own.
MISTRAL_24B: Component = ("Mistral3ForConditionalGeneration", {"tie_word_embeddings": False})
LLAMA_3_8B: Component = (
    "LlamaModel",
    {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128320,
    },
)
QWEN25_VL_7B: Component = (
    "Qwen2_5_VLForConditionalGeneration",
    {
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
    },
)
BERT_L: Component = ("BertModel", {**encoder_sizes(1024, 16, 24), "vocab_size": 47020})
SAFETY_CHECKER: Component = (
    "StableDiffusionSafetyChecker",
    {
        "projection_dim": 768,
        "text_config": {"hidden_size": 768},
        "vision_config": {**encoder_sizes(1024, 16, 24), "patch_size": 14},
    },
)
