"""Erasers with an effect on tiny transformers, and the folders they are saved in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.files import save_eraser
from tests.tiny_cogvideox import TEXT_WIDTH, tiny_transformer


def make_eraser(
    transformer: CogVideoXTransformer3DModel, adapter_name: str = "default", seed: int = 1, **config: Any
) -> CogVideoXTransformer3DModel:
    """Add an eraser of rank 4 with random weights to a transformer; returns the transformer."""
    torch.manual_seed(seed)
    config = {"r": 4, "init_weights": False} | config
    transformer.add_adapter(EraserConfig(**config), adapter_name=adapter_name)
    return transformer


def saved_eraser(folder: Path, seed: int = 1, format: str = "peft", **config: Any) -> Path:
    """Save a random eraser of `tiny_transformer()`; returns its folder."""
    save_eraser(make_eraser(tiny_transformer(), seed=seed, **config), folder, format=format)
    return folder


def inputs(transformer: CogVideoXTransformer3DModel) -> dict[str, Any]:
    """Arguments of a forward pass of two clips of 3 latent frames of 4x4."""
    generator = torch.Generator().manual_seed(5)
    head = transformer.config.attention_head_dim
    return {
        "hidden_states": torch.randn(2, 3, 4, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(2, 12, TEXT_WIDTH, generator=generator),
        "timestep": torch.tensor([900, 300]),
        "image_rotary_emb": get_3d_rotary_pos_embed(head, ((0, 0), (4, 4)), (4, 4), 3),
    }


def run(transformer: torch.nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    """Output `(2, 3, 4, 4, 4)` of `inputs`, without gradient."""
    arguments = inputs(transformer)
    for name in ("hidden_states", "encoder_hidden_states"):
        arguments[name] = arguments[name].to(dtype)
    with torch.no_grad():
        return transformer(**arguments, return_dict=False, **options)[0]
