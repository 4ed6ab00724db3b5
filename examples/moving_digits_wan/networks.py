"""The untrained parts of the moving digits' Wan, and its loss: flow matching over normalised latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5EncoderModel, UMT5Config, UMT5EncoderModel

from examples.digits_flux2.networks import FrozenTextLoss
from examples.moving_digits.check_model import load_pipeline
from examples.moving_digits.prompts import PROMPT_LENGTH

LATENT_CHANNELS, HEADS, HEAD_WIDTH = 16, 8, 16
_T5_SETTINGS = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "dropout_rate", "feed_forward_proj",
    "pad_token_id", "eos_token_id", "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip


def build_vae() -> AutoencoderKLWan:
    """9 frames of 16x16 to 3 of 4x4, as the CogVideoX of the moving digits does."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Decoded clips before they are clamped: a clamped pixel has no gradient, so a wrong one would stay wrong."""
    chunks: list[torch.Tensor] = []
    hook = vae.decoder.register_forward_hook(lambda module, inputs, output: chunks.append(output))
    try:
        vae.decode(latents)
    finally:
        hook.remove()
    return torch.cat(chunks, dim=2)


def normalize(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents `(clips, frames, channels, height, width)` of unit variance; the autoencoder keeps the statistics."""
    variance, mean = torch.var_mean(latents, dim=(0, 1, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=variance.sqrt().tolist())
    return (latents - mean[:, None, None]) / variance.sqrt()[:, None, None]


def build_transformer(text_width: int) -> WanTransformer3DModel:
    """1.0 M parameters; a token is 2 x 2 latent pixels, as in the published models."""
    width = HEADS * HEAD_WIDTH
    return WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=text_width,
        freq_dim=64,
        ffn_dim=2 * width,
        num_layers=4,
    )


def to_umt5(text_encoder: T5EncoderModel) -> UMT5EncoderModel:
    """The same function in Wan's class, in which each layer has position biases of its own, not the first one's."""
    config = {name: text_encoder.config.to_dict()[name] for name in _T5_SETTINGS}
    made = UMT5EncoderModel(UMT5Config(**config))
    weights = text_encoder.state_dict()
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for layer in range(1, text_encoder.config.num_layers):
        weights[first.replace("block.0", f"block.{layer}")] = weights[first]
    made.load_state_dict(weights)
    return made.eval()


def build_pipeline(vae: AutoencoderKLWan) -> WanPipeline:
    """An untrained transformer on a trained autoencoder and the text encoder of the moving digits' CogVideoX."""
    base = load_pipeline()
    transformer, scheduler = build_transformer(base.text_encoder.config.d_model), FlowMatchEulerDiscreteScheduler()
    return WanPipeline(base.tokenizer, to_umt5(base.text_encoder), vae, scheduler, transformer)


class TextToVelocity(FrozenTextLoss):
    """That of a Wan transformer."""

    encode_arguments = {"do_classifier_free_guidance": False, "max_sequence_length": PROMPT_LENGTH}

    def forward(
        self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, prompts: list[str]
    ) -> torch.Tensor:
        """Mean squared error for latents `(batch, frames, channels, height, width)` and their prompts."""
        sigma = times[:, None, None, None, None]
        velocity = self.transformer(
            hidden_states=((1 - sigma) * clean + sigma * noise).transpose(1, 2),
            timestep=1000 * times,
            encoder_hidden_states=self.encode(prompts),
            return_dict=False,
        )[0]
        return F.mse_loss(velocity.transpose(1, 2), noise - clean)
