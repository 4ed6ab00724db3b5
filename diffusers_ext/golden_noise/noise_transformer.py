"""The branch of NPNet that looks at the noise with a Swin transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers import SwinConfig, SwinModel

from diffusers_ext.golden_noise.swin_inference import has_hooks, swin_features


class NoiseTransformer(nn.Module):
    """Noise -> resized to Swin's image -> Swin -> resized to the noise (arXiv:2411.09502, Sec. 3).

    The official code reads Swin's `(batch, rows, columns, dim)` as `(batch, channels, height,
    width)`: rows become channels, columns become bands of rows, and every few features become the
    columns of the output. All published weights were trained that way, so it is kept.

    Args:
        image_size: of the Swin, in pixels.
        embed_dim: width of the first stage; each further stage doubles it.
        window_size: in patches; divides the side of the map of every stage.
        adapter: the design document's `nt_adapter`: a residual convolution block before the Swin
            that starts as the identity.
        finetune: `nt_finetune`: of the Swin only the last two stages are trained; otherwise all.
        dropout: `nt_dropout`: whole channels of the output are dropped in training.
    """

    def __init__(
        self,
        in_channels: int,
        sample_size: int,
        *,
        image_size: int = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        adapter: bool = False,
        finetune: bool = False,
        dropout: bool = False,
    ) -> None:
        super().__init__()
        self.sample_size, self.image_size = sample_size, image_size
        config = SwinConfig(
            image_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depths=list(depths),
            num_heads=list(num_heads),
            window_size=window_size,
        )
        self.grid_size = check_grid(image_size, patch_size, window_size, len(depths))
        self.downconv = nn.Conv2d(in_channels, 3, 1)
        self.adapter = None
        if adapter:
            self.adapter = nn.Sequential(
                nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 3, 1)
            )
            nn.init.zeros_(self.adapter[-1].weight)
            nn.init.zeros_(self.adapter[-1].bias)
        self.swin = SwinModel(config, add_pooling_layer=False)
        if finetune:
            self.swin.requires_grad_(False)
            self.swin.encoder.layers[-2:].requires_grad_(True)
            self.swin.layernorm.requires_grad_(True)
        self.upconv = nn.Conv2d(self.grid_size, in_channels, 1)
        self.dropout = nn.Dropout2d(0.2) if dropout else nn.Identity()

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        # A 1x1 convolution and nearest resizing commute; this order convolves fewer pixels.
        image = F.interpolate(self.downconv(noise), self.image_size, mode="nearest")
        if self.adapter is not None:
            image = image + self.adapter(image)
        if self.training or torch.is_grad_enabled() or has_hooks(self.swin):
            features = self.swin(image).last_hidden_state
        else:
            features = swin_features(self.swin, image)
        bands = features.unflatten(1, (self.grid_size, self.grid_size))
        return self.dropout(self.upconv(F.interpolate(bands, (self.sample_size,) * 2)))


def check_grid(image_size: int, patch_size: int, window_size: int, stages: int) -> int:
    """The side of the last stage's map; `ValueError` unless windows tile the map of every stage."""
    last = patch_size * 2 ** (stages - 1)
    if image_size % last or (image_size // last) % window_size:
        raise ValueError(
            f"`swin_image_size` must be a multiple of patch * 2^(stages - 1) * window = "
            f"{last * window_size}, got {image_size}."
        )
    return image_size // last


class NoiseCrossAttention(nn.Module):
    """The design document's `cross_attention`: what the Swin branch made attends to the text-scaled noise.

    Each position of the branch's output is a query, each position of the text-scaled noise a key;
    a residual that starts at zero.
    """

    def __init__(self, channels: int, num_heads: int = 8, head_dim: int = 64) -> None:
        super().__init__()
        self.attention = Attention(
            channels, cross_attention_dim=channels, heads=num_heads, dim_head=head_dim
        )
        nn.init.zeros_(self.attention.to_out[0].weight)
        nn.init.zeros_(self.attention.to_out[0].bias)

    def forward(self, features: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        queries, keys = (x.flatten(2).transpose(1, 2) for x in (features, context))
        mixed = self.attention(queries, encoder_hidden_states=keys)
        return features + mixed.transpose(1, 2).reshape(features.shape)
