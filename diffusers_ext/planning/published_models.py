"""Shapes of the published base models: what their configs say besides the defaults of their classes.

Read from the `config.json` of each component on the Hub. Wherever the number of parameters is
published, the tests compare it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.core.base_source import is_single_file
from diffusers_ext.core.suggestions import did_you_mean
from diffusers_ext.families.cogvideox import PUBLISHED_TRANSFORMERS
from diffusers_ext.planning.base_model import BaseModel, Component, read_folder
from diffusers_ext.planning.published_encoders import (
    BERT_L,
    CLIP_BIG_G,
    CLIP_L,
    CLIP_L_PROJECTION,
    MT5_XL,
    OPEN_CLIP_H,
    SAFETY_CHECKER,
    SDXL_VAE,
    T5_XXL,
    VAE,
    VAE_16,
)


_SDXL_UNET = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD2_UNET = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_HUNYUAN_DIT = {
    "hidden_size": 1408,
    "in_channels": 4,
    "mlp_ratio": 4.3637,
    "num_layers": 40,
    "patch_size": 2,
    "sample_size": 128,
}
_SD3 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}


def _stable_diffusion(unet: dict[str, Any], **others: Component) -> dict[str, Component]:
    return {**others, "unet": Component("UNet2DConditionModel", unet)}


def _flux(guidance_embeds: bool) -> dict[str, Component]:
    transformer = Component("FluxTransformer2DModel", {"guidance_embeds": guidance_embeds})
    encoders = {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL}
    return {"vae": VAE_16, **encoders, "transformer": transformer}


# name on the Hub -> (short name, pipeline, components, dtype of the published weights)
_IMAGE_MODELS: dict[str, tuple[str, str, dict[str, Component], torch.dtype]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "SD1.5",
        "StableDiffusionPipeline",
        _stable_diffusion(
            {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
            vae=VAE,
            text_encoder=CLIP_L,
            safety_checker=SAFETY_CHECKER,
        ),
        torch.float32,
    ),
    "stabilityai/stable-diffusion-2-1": (
        "SD2.1",
        "StableDiffusionPipeline",
        _stable_diffusion({**_SD2_UNET, "sample_size": 96}, vae=VAE, text_encoder=OPEN_CLIP_H),
        torch.float32,
    ),
    "stabilityai/stable-diffusion-2-1-base": (
        "SD2.1-base",
        "StableDiffusionPipeline",
        _stable_diffusion({**_SD2_UNET, "sample_size": 64}, vae=VAE, text_encoder=OPEN_CLIP_H),
        torch.float32,
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "SDXL",
        "StableDiffusionXLPipeline",
        _stable_diffusion(_SDXL_UNET, vae=SDXL_VAE, text_encoder=CLIP_L, text_encoder_2=CLIP_BIG_G),
        torch.float32,
    ),
    "Tencent-Hunyuan/HunyuanDiT-Diffusers": (
        "Hunyuan-DiT",
        "HunyuanDiTPipeline",
        {
            "vae": SDXL_VAE,
            "text_encoder": BERT_L,
            "transformer": Component("HunyuanDiT2DModel", _HUNYUAN_DIT),
            "text_encoder_2": MT5_XL,
        },
        torch.float32,
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        "SD3",
        "StableDiffusion3Pipeline",
        {
            "transformer": Component("SD3Transformer2DModel", _SD3),
            "vae": VAE_16,
            "text_encoder": CLIP_L_PROJECTION,
            "text_encoder_2": CLIP_BIG_G,
            "text_encoder_3": T5_XXL,
        },
        torch.float16,
    ),
    "black-forest-labs/FLUX.1-dev": ("FLUX.1-dev", "FluxPipeline", _flux(True), torch.bfloat16),
    "black-forest-labs/FLUX.1-schnell": (
        "FLUX.1-schnell",
        "FluxPipeline",
        _flux(False),
        torch.bfloat16,
    ),
}


def read_base_model(model: str | os.PathLike) -> BaseModel:
    """A published base model by its name, or a pipeline in a local folder.

    Nothing is fetched, and of a folder only configs are read.

    Args:
        model: such as `"SDXL"`, `"stabilityai/stable-diffusion-xl-base-1.0"` or `"CogVideoX-5b"`, or
            a folder.

    Raises:
        ValueError: neither, or a folder of a pipeline that is not known here.
    """
    if Path(model).is_dir():
        return read_folder(Path(model))
    if is_single_file(model):
        raise ValueError(
            f"`model` must be the folder of a pipeline or a published name, got {model}, a single file, "
            "which has no configs to plan by. Name the model that it is derived from, such as SDXL."
        )
    found = published_model(str(model))
    if found is None:
        raise ValueError(
            f"`model` must be the folder of a pipeline or one of {published_names()}, got "
            f"{str(model)!r}.{did_you_mean(str(model), published_names())} Download another model and name its folder."
        )
    return found


def published_names() -> list[str]:
    """Short names of all that are known, in order."""
    return [*(entry[0] for entry in _IMAGE_MODELS.values()), *PUBLISHED_TRANSFORMERS]


def published_model(name: str) -> BaseModel | None:
    """The model of a short name or a name on the Hub, in any spelling; `None` for another."""
    wanted = _key(name.rpartition("/")[2])
    for repository, (short, pipeline, components, dtype) in _IMAGE_MODELS.items():
        if wanted in (_key(short), _key(repository.rpartition("/")[2])):
            return BaseModel(repository, pipeline, components, dtype)
    for short, transformer in PUBLISHED_TRANSFORMERS.items():
        if wanted == _key(short):
            return _cogvideox(short, transformer)
    return None


def _cogvideox(name: str, transformer: dict[str, Any]) -> BaseModel:
    components = {
        "text_encoder": T5_XXL,
        "vae": Component("AutoencoderKLCogVideoX", {}),
        "transformer": Component("CogVideoXTransformer3DModel", transformer),
    }
    dtype = torch.float16 if name == "CogVideoX-2b" else torch.bfloat16
    return BaseModel(f"zai-org/{name}", "CogVideoXPipeline", components, dtype)


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
