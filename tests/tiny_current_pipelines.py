"""Tiny random pipelines of today's families, real diffusers classes: FLUX.2 klein."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen3ForCausalLM

from tests.tiny_text_encoders import qwen3_config, qwen_tokenizer


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
