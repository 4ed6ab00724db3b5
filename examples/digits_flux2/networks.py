"""The untrained parts of the digits' FLUX.2, and its loss: flow matching over packed latents."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    StableDiffusionPipeline,
)

from examples.digits_flux2.pipeline import DigitsFlux2Pipeline

# Of one message, so that prompts reach the text encoder as they are written.
CHAT_TEMPLATE = "{{ messages[0]['content'] }}"


def build_transformer(text_width: int, latent_channels: int) -> Flux2Transformer2DModel:
    """1.0 M parameters: three blocks of two streams, three of one."""
    return Flux2Transformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=text_width,
        timestep_guidance_channels=64,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 6, 6, 8),
        guidance_embeds=False,
    )


def build_flux2_vae(vae: AutoencoderKL) -> AutoencoderKLFlux2:
    """The same autoencoder as FLUX.2's, whose latents are normalised by statistics of 2 x 2 patches."""
    known = {
        name: vae.config[name] for name in vae.config if name in AutoencoderKLFlux2._get_init_keys(AutoencoderKLFlux2)
    }
    flux2_vae = AutoencoderKLFlux2(**known)
    flux2_vae.load_state_dict({**flux2_vae.bn.state_dict(prefix="bn."), **vae.state_dict()})
    return flux2_vae.eval()


def build_pipeline(base: StableDiffusionPipeline) -> DigitsFlux2Pipeline:
    """An untrained transformer on the autoencoder and the text encoder of another digits model."""
    base.tokenizer.chat_template = CHAT_TEMPLATE
    vae = build_flux2_vae(base.vae)
    transformer = build_transformer(base.text_encoder.config.hidden_size, vae.config.latent_channels)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return DigitsFlux2Pipeline(scheduler, vae, base.text_encoder, base.tokenizer, transformer)


def normalized_patches(pipeline: DigitsFlux2Pipeline, latents: torch.Tensor) -> torch.Tensor:
    """Latents `(..., channels, height, width)` as patches of unit variance; the autoencoder learns the statistics."""
    patches = pipeline._patchify_latents(latents.flatten(0, -4))
    variance, mean = torch.var_mean(patches, dim=(0, 2, 3))
    pipeline.vae.bn.running_mean.copy_(mean)
    pipeline.vae.bn.running_var.copy_(variance)
    patches = (patches - mean[:, None, None]) / (variance[:, None, None] + pipeline.vae.config.batch_norm_eps).sqrt()
    return patches.unflatten(0, latents.shape[:-3])


class FrozenTextLoss(torch.nn.Module):
    """The loss of a transformer that reads a frozen text encoder, whose embeddings of a prompt are kept.

    `x_sigma = (1 - sigma) x_0 + sigma noise`, and the transformer predicts `noise - x_0`.
    """

    encode_arguments: ClassVar[dict[str, Any]] = {}  # of the pipeline's `encode_prompt`

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        super().__init__()
        self.transformer, self._pipeline = pipeline.transformer, pipeline
        pipeline.text_encoder.requires_grad_(False)
        self._encoded: dict[str, torch.Tensor] = {}

    def draw_times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Logit-normal levels of noise, `(count,)` in (0, 1)."""
        return torch.randn(count, generator=generator).sigmoid()

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> torch.Tensor:
        """The embeddings of prompts as one batch."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._encoded:
                self._encoded[prompt] = self._pipeline.encode_prompt(prompt, **self.encode_arguments)[0][0]
        return torch.stack([self._encoded[prompt] for prompt in prompts])


class TextToVelocity(FrozenTextLoss):
    """That of a FLUX.2 transformer."""

    learning_rate = 2e-3

    def forward(
        self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, prompts: list[str]
    ) -> torch.Tensor:
        """Mean squared error for patches `(batch, channels, height, width)` and their prompts."""
        pipeline, sigma = self._pipeline, times[:, None, None, None]
        prompt_embeds = self.encode(prompts)
        velocity = self.transformer(
            hidden_states=pipeline._pack_latents((1 - sigma) * clean + sigma * noise),
            timestep=times,
            encoder_hidden_states=prompt_embeds,
            txt_ids=pipeline._prepare_text_ids(prompt_embeds).to(clean.device),
            img_ids=pipeline._prepare_latent_ids(clean).to(clean.device),
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, pipeline._pack_latents(noise - clean))
