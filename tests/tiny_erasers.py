"""Random erasers on tiny CogVideoX transformers, and inputs to run them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import nn

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.model import register_eraser
from tests.tiny_cogvideox import TEXT_WIDTH

TEXT, VIDEO, WIDTH = 5, 48, 32
register_eraser()


def transformer_inputs(dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Any]:
    """Arguments of a forward pass of `tiny_transformer()`: 5 text and 48 video tokens."""
    generator = torch.Generator().manual_seed(3)
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3)
    return {
        "hidden_states": torch.randn(batch, 3, 4, 4, 4, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, TEXT, TEXT_WIDTH, generator=generator).to(dtype),
        "timestep": torch.arange(batch) * 100 + 50,
        "image_rotary_emb": rotary,
        "return_dict": False,
    }


@torch.no_grad()
def velocity(model: nn.Module, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor:
    """What the transformer predicts for `transformer_inputs`, without gradient."""
    return model(**transformer_inputs(dtype), **kwargs)[0]


def add_random_eraser(model: nn.Module, adapter_name: str = "default", seed: int = 0, **config: Any) -> None:
    """Add an eraser whose `up` is drawn at random too, through diffusers' `add_adapter`."""
    torch.manual_seed(seed)
    settings = {"r": 4, "init_weights": False} | config
    model.add_adapter(EraserConfig(**settings), adapter_name)
