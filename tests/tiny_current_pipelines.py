"""Tiny random pipelines of today's families, real diffusers classes: FLUX.2 klein, Qwen-Image, Z-Image, Wan."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen3ForCausalLM, Qwen3Model

from examples.digits.prompts import make_tokenizer
from tests.tiny_text_encoders import qwen3_config, qwen_tokenizer, qwen_vl, umt5


def tiny_flux2_pipeline(seed: int = 0) -> Flux2KleinPipeline:
    """Text of 3 x 32; 4 VAE channels (16 patched), 32 x 32 pixels are 8 x 8 latents.

    The pipeline reads layers 9, 18 and 27 of the text encoder, so that it has 27.
    """
    tokenizer = qwen_tokenizer()
    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    pipeline = Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae.eval(),
        Qwen3ForCausalLM(qwen3_config(tokenizer, 32, 27)).eval(),
        tokenizer,
        transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_qwen_image_pipeline(seed: int = 0) -> QwenImagePipeline:
    """Text of 32; 4 channels (16 packed), 32 x 32 pixels are 8 x 8 latents."""
    tokenizer = qwen_tokenizer()
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    pipeline = QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae.eval(),
        qwen_vl(tokenizer, 32),
        tokenizer,
        transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_z_image_pipeline(seed: int = 0) -> ZImagePipeline:
    """Text of 32; 4 channels, 32 x 32 pixels are 8 x 8 latents.

    The context refiner is wider than two texts of 32 tokens, which its padding fills, so that directions are left.
    """
    tokenizer = qwen_tokenizer()
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=80,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[16, 12, 12],
        axes_lens=[128, 32, 32],
    )
    # Their values are whatever is in memory until weights are loaded.
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    pipeline = ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae.eval(),
        Qwen3Model(qwen3_config(tokenizer, 32, 2)).eval(),
        tokenizer,
        transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_wan_pipeline(seed: int = 0) -> WanPipeline:
    """512 tokens of 32-wide UMT5 text; 4 channels, 32 x 32 pixels are 4 x 4 latents."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=24,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    pipeline = WanPipeline(
        tokenizer, umt5(tokenizer, 32), vae.eval(), FlowMatchEulerDiscreteScheduler(shift=3.0), transformer.eval()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
