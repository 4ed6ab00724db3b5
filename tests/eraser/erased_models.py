"""Tiny CogVideoX models of each kind, with an eraser that does something."""

from __future__ import annotations

import torch
from diffusers import CogVideoXPipeline

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.model import register_eraser
from tests.tiny_cogvideox import tiny_video_pipeline

ABSOLUTE = {"use_rotary_positional_embeddings": False}
PATCHES_IN_TIME = {"patch_size": 2, "patch_size_t": 2, "sample_height": 8, "sample_width": 8}
KINDS = {"rotary": {}, "absolute": ABSOLUTE, "1.5": PATCHES_IN_TIME}


def erased_pipeline(kind: str = "rotary", dtype: torch.dtype = torch.float64) -> CogVideoXPipeline:
    """A pipeline whose transformer has a random trainable eraser of rank 4, named `"eraser"`."""
    register_eraser()
    pipeline = tiny_video_pipeline(**KINDS[kind])
    pipeline.transformer.to(dtype)
    torch.manual_seed(1)
    pipeline.transformer.add_adapter(EraserConfig(r=4, init_weights=False), "eraser")
    return pipeline


def random_rows(batch: int, frames: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64):
    """`(x_t, t, prompt_embeds)` for clips of 16x16 pixels."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, frames, 4, 4, 4, generator=generator, dtype=dtype)
    t = torch.randint(1000, (batch,), generator=generator)
    return x_t, t, torch.randn(batch, 12, 16, generator=generator, dtype=dtype)
