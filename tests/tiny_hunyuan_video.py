"""A tiny HunyuanVideo with random weights, of real classes."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, Qwen2Tokenizer

from examples.digits.prompts import make_tokenizer
from tests.tiny_text_encoders import qwen_tokenizer


def tiny_hunyuan_video_pipeline(seed: int = 0) -> HunyuanVideoPipeline:
    """256 tokens of 16-wide text and 12 of pooled; 4 channels, 9 frames of 32 x 32 pixels are 3 x 4 x 4 latents."""
    tokenizer, tokenizer_2 = qwen_tokenizer(), make_tokenizer()
    tokenizer_2.model_max_length = 77
    torch.manual_seed(seed)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    text_encoder, text_encoder_2 = _text_encoders(tokenizer, tokenizer_2)
    pipeline = HunyuanVideoPipeline(
        text_encoder,
        tokenizer,
        transformer.eval(),
        vae.eval(),
        FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2,
        tokenizer_2,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _text_encoders(tokenizer: Qwen2Tokenizer, tokenizer_2: CLIPTokenizer) -> tuple[LlamaModel, CLIPTextModel]:
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer_2),
        hidden_size=12,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer_2.bos_token_id,
        eos_token_id=tokenizer_2.eos_token_id,
        pad_token_id=tokenizer_2.pad_token_id,
    )
    return LlamaModel(llama).eval(), CLIPTextModel(clip).eval()
