"""The untrained parts of the moving-digits CogVideoX, the schedule of its noise, and its loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from examples.moving_digits.clips import CANVAS, NUM_FRAMES
from examples.moving_digits.prompts import PROMPT_LENGTH, make_tokenizer

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


def decode(vae: AutoencoderKLCogVideoX, latents: torch.Tensor) -> torch.Tensor:
    """Clips `(clips, 3, frames, height, width)`, not clamped."""
    return vae.decode(latents).sample


def normalize(vae: AutoencoderKLCogVideoX, latents: torch.Tensor) -> torch.Tensor:
    """Latents `(clips, frames, channels, height, width)` of unit variance; the autoencoder keeps the factor."""
    scaling_factor = 1.0 / latents.std().item()
    vae.register_to_config(scaling_factor=scaling_factor)
    return latents * scaling_factor


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


def build_pipeline(vae: AutoencoderKLCogVideoX) -> CogVideoXPipeline:
    """An untrained transformer and text encoder on a trained autoencoder."""
    tokenizer = make_tokenizer()
    return CogVideoXPipeline(tokenizer, build_text_encoder(tokenizer), vae, build_transformer(), build_scheduler())


class TextToVelocity(torch.nn.Module):
    """The loss of text encoder and transformer, which train as one module."""

    def __init__(self, pipeline: CogVideoXPipeline) -> None:
        super().__init__()
        self.text_encoder, self.transformer = pipeline.text_encoder, pipeline.transformer
        self._tokenizer, self._scheduler = pipeline.tokenizer, pipeline.scheduler
        self._rotary = pipeline._prepare_rotary_positional_embeddings(CANVAS, CANVAS, LATENT_FRAMES, pipeline.device)

    def draw_times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Timesteps `(count,)`."""
        return torch.randint(1000, (count,), generator=generator)

    def forward(
        self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, prompts: list[str]
    ) -> torch.Tensor:
        """Mean squared error of the velocity in latents `(batch, frames, channels, height, width)`."""
        tokens = self._tokenizer(prompts, padding="max_length", max_length=PROMPT_LENGTH, return_tensors="pt")
        text = self.text_encoder(tokens.input_ids.to(clean.device))[0]
        rotary = tuple(table.to(clean.device) for table in self._rotary)
        noisy = self._scheduler.add_noise(clean, noise, times)
        prediction = self.transformer(noisy, text, times, image_rotary_emb=rotary, return_dict=False)[0]
        return F.mse_loss(prediction, self._scheduler.get_velocity(clean, noise, times))
