"""Tiny random pipelines of today's families, real classes: FLUX.2, Qwen-Image, Z-Image, AuraFlow, Wan, LTX-2."""

from __future__ import annotations

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import Qwen3ForCausalLM, Qwen3Model

from examples.digits.prompts import make_tokenizer
from tests.tiny_text_encoders import gemma, gemma_tokenizer, qwen3_config, qwen_tokenizer, qwen_vl, umt5


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


def tiny_auraflow_pipeline(seed: int = 0) -> AuraFlowPipeline:
    """256 tokens of 32-wide UMT5 text; 4 channels, 32 x 32 pixels are 8 x 8 latents."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=1024,
    )
    # Their gates are so small at this width that text would hardly be seen.
    for block in (*transformer.joint_transformer_blocks, *transformer.single_transformer_blocks):
        block.norm1.linear.weight.data *= 8
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    pipeline = AuraFlowPipeline(
        tokenizer, umt5(tokenizer, 32), vae.eval(), transformer.eval(), FlowMatchEulerDiscreteScheduler(shift=1.73)
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


def tiny_ltx2_pipeline(seed: int = 0) -> LTX2Pipeline:
    """Text of 3 x 48, connectors of 48 with 8 registers; clips of 32 x 32 pixels are 16 x 16 latents of 4 channels.

    Connectors and attention are wider than two texts of 16 tokens, which registers fill, so that directions are left.
    """
    tokenizer = gemma_tokenizer()
    torch.manual_seed(seed)
    text_encoder = gemma(tokenizer, 48)
    streams = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "cross_attention_dim": 48,
        "in_channels": 4,
        "out_channels": 4,
    }
    transformer = LTX2VideoTransformer3DModel(
        **streams,
        **{f"audio_{name}": value for name, value in streams.items()},
        num_layers=1,
        caption_channels=48,
        rope_double_precision=False,
        rope_type="split",
    )
    connector = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 1, "num_learnable_registers": 8}
    connectors = LTX2TextConnectors(
        caption_channels=48,
        text_proj_in_factor=3,
        **{f"{stream}_connector_{name}": value for stream in ("video", "audio") for name, value in connector.items()},
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )
    pipeline = LTX2Pipeline(
        FlowMatchEulerDiscreteScheduler(),
        *_ltx2_vaes(),
        text_encoder,
        tokenizer,
        connectors.eval(),
        transformer.eval(),
        LTX2Vocoder(
            in_channels=16,
            hidden_channels=8,
            out_channels=2,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _ltx2_vaes() -> tuple[AutoencoderKLLTX2Video, AutoencoderKLLTX2Audio]:
    video = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
    )
    audio = AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    )
    return video.eval(), audio.eval()
