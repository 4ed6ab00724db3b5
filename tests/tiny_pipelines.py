"""Tiny random SDXL and PixArt pipelines of real diffusers classes, for 16-token prompts."""

from __future__ import annotations

import torch
from diffusers import (
    DDIMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from examples.digits.prompts import make_tokenizer
from examples.digits.train_model import build_vae
from tests.tiny_models import sdxl_unet


def sdxl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """32 + 48 wide text of two encoders, 8 cross-attention layers, 32 x 32 pixels."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    encoders = (
        CLIPTextModel(_clip_config(tokenizer, width=32)),
        CLIPTextModelWithProjection(_clip_config(tokenizer, width=48)),
    )
    unet = UNet2DConditionModel.from_config(sdxl_unet().model.config, cross_attention_dim=80)
    pipeline = StableDiffusionXLPipeline(
        build_vae().eval(),
        encoders[0].eval(),
        encoders[1].eval(),
        tokenizer,
        tokenizer,
        unet.eval(),
        DDIMScheduler(steps_offset=1, clip_sample=False),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=16,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pixart_pipeline(seed: int = 0) -> PixArtAlphaPipeline:
    """12-wide T5 text, 2 cross-attention layers."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(tokenizer), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=32,
        caption_channels=12,
        norm_num_groups=8,
        use_additional_conditions=False,
    )
    pipeline = PixArtAlphaPipeline(
        tokenizer, T5EncoderModel(config).eval(), build_vae().eval(), transformer.eval(),
        DDIMScheduler(steps_offset=1, clip_sample=False),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
