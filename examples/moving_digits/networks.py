"""The untrained parts of the moving-digits CogVideoX: sizes, and the schedule of its noise."""

from __future__ import annotations

from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from examples.moving_digits.clips import CANVAS, NUM_FRAMES
from examples.moving_digits.prompts import PROMPT_LENGTH

TEXT_WIDTH, HEADS, HEAD_WIDTH = 64, 6, 16
LATENT_CHANNELS, LATENT_FRAMES, LATENT_SIZE = 16, 3, 4


def build_vae() -> AutoencoderKLCogVideoX:
    """9 frames of 16x16 to 3 of 4x4; three levels, because the pipeline counts on 4 frames a latent."""
    return AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 32),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_height=CANVAS,
        sample_width=CANVAS,
        temporal_compression_ratio=4,
    )


def build_transformer() -> CogVideoXTransformer3DModel:
    """1.1 M parameters, rotary positions as the 5b models, one token a latent pixel."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=TEXT_WIDTH,
        num_layers=4,
        sample_width=LATENT_SIZE,
        sample_height=LATENT_SIZE,
        sample_frames=NUM_FRAMES,
        patch_size=1,
        max_text_seq_length=PROMPT_LENGTH,
        use_rotary_positional_embeddings=True,
    )


def build_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A two-layer T5 encoder for `tokenizer`."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_scheduler() -> CogVideoXDDIMScheduler:
    """The noise schedule of CogVideoX-5b: velocity, zero terminal signal, trailing steps."""
    return CogVideoXDDIMScheduler(
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
    )
