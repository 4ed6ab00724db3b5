"""A tiny HunyuanVideo and HunyuanVideo 1.5 with random weights, of real classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
)

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


@contextmanager
def few_tokens() -> Iterator[None]:
    """Let pipelines of HunyuanVideo 1.5 that are made meanwhile read 41 tokens, not 1985."""
    make = HunyuanVideo15Pipeline.__init__

    @wraps(make)
    def make_small(pipeline: HunyuanVideo15Pipeline, *args: Any, **kwargs: Any) -> None:
        make(pipeline, *args, **kwargs)
        pipeline.system_message, pipeline.prompt_template_encode_start_idx = "", 5
        pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 24, 14
        pipeline.vision_num_semantic_tokens = 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HunyuanVideo15Pipeline, "__init__", make_small)
        yield


def tiny_hunyuan_video15_pipeline(seed: int = 0) -> HunyuanVideo15Pipeline:
    """Text of 16 and spellings of 8; 4 channels, 5 frames of 32 x 32 pixels are 2 x 2 x 2 latents."""
    tokenizer = qwen_tokenizer()
    torch.manual_seed(seed)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=1.0,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        target_size=64,
        task_type="t2v",
    )
    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1)
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    )
    if "rope_parameters" not in Qwen2_5_VLTextConfig().to_dict():  # transformers 4
        qwen.rope_scaling = {"type": "default", "mrope_section": [1, 1, 2]}
    t5 = T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    pipeline = HunyuanVideo15Pipeline(
        Qwen2_5_VLTextModel(qwen).eval(),
        tokenizer,
        transformer.eval(),
        vae.eval(),
        FlowMatchEulerDiscreteScheduler(shift=5.0),
        T5EncoderModel(t5).eval(),
        ByT5Tokenizer(),
        ClassifierFreeGuidance(guidance_scale=6.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
