"""Tiny CogVideoX models with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from examples.moving_digits.prompts import PROMPT_LENGTH, make_tokenizer

TEXT_WIDTH = 16


def tiny_transformer(seed: int = 0, **overrides: Any) -> CogVideoXTransformer3DModel:
    """Two layers of width 32, rotary positions, one token a latent pixel; in eval mode."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": TEXT_WIDTH,
        "num_layers": 2,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 9,
        "patch_size": 1,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": PROMPT_LENGTH,
        "use_rotary_positional_embeddings": True,
    }
    torch.manual_seed(seed)
    return CogVideoXTransformer3DModel(**config | overrides).eval()


def tiny_vae(seed: int = 0) -> AutoencoderKLCogVideoX:
    """9 frames of 16x16 to 3 of 4x4 with 4 channels; in eval mode."""
    torch.manual_seed(seed)
    return AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_height=16,
        sample_width=16,
        temporal_compression_ratio=4,
    ).eval()


def tiny_image_to_video_pipeline(seed: int = 0) -> CogVideoXImageToVideoPipeline:
    """Random, of the same size as `tiny_video_pipeline`."""
    pipeline = CogVideoXImageToVideoPipeline(**tiny_video_pipeline(seed, in_channels=8).components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_video_pipeline(seed: int = 0, **overrides: Any) -> CogVideoXPipeline:
    """A whole pipeline over 16x16 clips of 9 frames; `overrides` are of the transformer's config."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    scheduler = CogVideoXDDIMScheduler(
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
    )
    transformer = tiny_transformer(seed, **overrides)
    pipeline = CogVideoXPipeline(tokenizer, text_encoder, tiny_vae(seed), transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
