"""A residual transformer from noise and prompt to golden noise, for any size, aspect and prompt length."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork, check_channels, check_text
from diffusers_ext.golden_noise.networks.blocks import TextReader, TransformerBlock, patch_positions


class GoldenNoiseModel(GoldenNoiseNetwork, ModelMixin, ConfigMixin):
    """`golden = noise + head(transformer(patches of noise, tokens of the prompt))`.

    The head starts at zero, so an untrained network is the identity to the bit. Patches carry their position relative
    to the picture, and attention takes any number of them, so a network trained at one size runs at all. It learns the
    re-denoised change of "Golden Noise for Diffusion Models" (Zhou et al., arXiv:2411.09502); the defaults are the
    SDXL configuration, 9 M parameters.

    Args:
        in_channels: of the latents, 4 (SD, SDXL, Hunyuan-DiT) or 16 (SD3, Flux).
        patch_size: latent pixels a side of one token.
        sample_size: latent pixels a side at the size trained at; it sets the finest position wave.
        text_embed_dim: width of the text embeddings.
    """

    config_name = "config.json"

    _counted: ClassVar[tuple[str, ...]] = ("num_layers",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: int = 2,
        sample_size: int = 128,
        text_embed_dim: int = 2048,
        width: int = 256,
        num_layers: int = 8,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        patch = in_channels * patch_size**2
        if width < patch:
            raise ValueError(
                f"`width` must be at least the {patch} numbers of a patch, got {width}: a narrower "
                "token cannot hold its noise."
            )
        self.embed = nn.Linear(patch, width)
        self.text = TextReader(text_embed_dim, width, num_layers=0, num_heads=num_heads, feedforward=width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, 4 * width, context_width=width) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, noise: torch.Tensor, prompt_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Golden noise before its spectrum is matched.

        Shapes and errors as in `refine`; it has the shape of `noise`.
        """
        config = self.config
        check_text(noise, prompt_embeds, attention_mask)
        check_channels(noise, prompt_embeds, config.in_channels, config.text_embed_dim)
        patches, grid = to_patches(noise, config.patch_size)
        tokens = self.embed(patches) + patch_positions(
            *grid, config.width, config.sample_size / config.patch_size / 2, noise.device
        ).to(noise.dtype)
        text = self.text(prompt_embeds, attention_mask)
        for block in self.blocks:
            tokens, _ = block(tokens, text.tokens, context_mask=text.mask)
        change = from_patches(self.head(self.norm(tokens)), grid, config.patch_size)
        return noise + change[..., : noise.shape[-2], : noise.shape[-1]]

    def golden_noise(
        self,
        noise: torch.Tensor,
        prompt_embeds: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`forward` through the module's hooks; pooled embeddings are not read."""
        return self(noise, prompt_embeds, attention_mask)


def to_patches(latents: torch.Tensor, patch_size: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Cut latents into patches, row by row; a size that is no multiple is padded with zeros.

    `(batch, rows * columns, channels * patch_size**2)`, and `(rows, columns)`.
    """
    missing = [-side % patch_size for side in latents.shape[-2:]]
    latents = F.pad(latents, (0, missing[1], 0, missing[0]))
    grid = latents.shape[-2] // patch_size, latents.shape[-1] // patch_size
    # `unfold` gives (batch, numbers of a patch, patches): channel by channel, each row by row.
    return F.unfold(latents, patch_size, stride=patch_size).transpose(1, 2), grid


def from_patches(patches: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """The inverse of `to_patches`, with the padding still there."""
    size = grid[0] * patch_size, grid[1] * patch_size
    return F.fold(patches.transpose(1, 2), size, patch_size, stride=patch_size)
