"""A Stable Diffusion pipeline of the digits example's classes and sizes, with random weights."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline

from examples.digits.prompts import make_tokenizer
from examples.digits.train_model import build_scheduler, build_text_encoder, build_unet, build_vae


def random_digits_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """7 cross-attention layers, 128-wide text of 16 tokens, latents of 8 x 8 at 32 x 32 pixels."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    pipeline = StableDiffusionPipeline(
        build_vae().eval(),
        build_text_encoder(tokenizer).eval(),
        tokenizer,
        build_unet().eval(),
        build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
