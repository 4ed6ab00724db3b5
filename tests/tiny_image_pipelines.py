"""Tiny random Hunyuan-DiT, SD3, Flux and Chroma pipelines of real diffusers classes, latents of 8 x 8."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from examples.digits.prompts import make_tokenizer


def tiny_hunyuan_dit_pipeline(
    seed: int = 0, *, image_conditions: bool = True, text_width: int = 8
) -> HunyuanDiTPipeline:
    """77 tokens of BERT text and 256 of T5, v-prediction, latents of 4 channels.

    Call it with 64 x 64 pixels and `use_resolution_binning=False`: the pipeline divides by 8. `image_conditions=False`
    is version 1.2 of the model, which sees no size and no style.
    """
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    bert = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=77,
    )
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        hidden_size=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        num_layers=4,
        cross_attention_dim=text_width,
        cross_attention_dim_t5=text_width,
        pooled_projection_dim=4,
        use_style_cond_and_image_meta_size=image_conditions,
    )
    pipeline = HunyuanDiTPipeline(
        _vae(latent_channels=4, levels=4),
        BertModel(bert).eval(),
        tokenizer,
        transformer.eval(),
        DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.02,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            steps_offset=1,
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=_t5(tokenizer, width=text_width),
        tokenizer_2=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd3_pipeline(seed: int = 0, *, text_width: int = 32) -> StableDiffusion3Pipeline:
    """16 tokens of two CLIP encoders, 32 wide, and 256 of T5; 16 channels, 32 x 32 pixels."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    )
    encoders = [CLIPTextModelWithProjection(_clip(tokenizer)).eval() for _ in range(2)]
    pipeline = StableDiffusion3Pipeline(
        transformer.eval(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        _vae(latent_channels=16, levels=3),
        encoders[0],
        tokenizer,
        encoders[1],
        tokenizer,
        _t5(tokenizer, width=text_width),
        tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux_pipeline(seed: int = 0, *, guidance_embeds: bool = True, text_width: int = 12) -> FluxPipeline:
    """512 tokens of T5 text, 16-wide pooled CLIP; 16 channels (64 packed), 32 x 32 pixels.

    `guidance_embeds=True` is Flux.1-dev, which takes the guidance scale as an input; `False` is Flux.1-schnell.
    """
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds),
        _vae(latent_channels=16, levels=3),
        CLIPTextModel(_clip(tokenizer)).eval(),
        tokenizer,
        _t5(tokenizer, width=text_width),
        tokenizer,
        transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_chroma_pipeline(seed: int = 0, *, text_width: int = 32) -> ChromaPipeline:
    """512 tokens of T5 text; 16 channels (64 packed), 32 x 32 pixels."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    transformer = ChromaTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipeline = ChromaPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        _vae(latent_channels=16, levels=3),
        _t5(tokenizer, width=text_width),
        tokenizer,
        transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _vae(latent_channels: int, levels: int) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        shift_factor=0.1,
    )
    return vae.eval()


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        projection_dim=8,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5(tokenizer: CLIPTokenizer, width: int) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()
