"""Convolutional residual blocks under a condition, and changes of resolution for any size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_ext.golden_noise.film import FiLM


MOST_GROUPS = 16


def group_norm(channels: int) -> nn.GroupNorm:
    """As many groups as divide `channels`, at most 16."""
    return nn.GroupNorm(math.gcd(MOST_GROUPS, channels), channels)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, with FiLM after the second norm, plus the input.

    The pre-activation order of He et al., "Identity Mappings in Deep Residual Networks" (2016).
    """

    def __init__(
        self, in_channels: int, out_channels: int, condition_dim: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm_in = group_norm(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_out = group_norm(out_channels)
        self.film = FiLM(condition_dim, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Args: `features` `(batch, channels, height, width)`, `condition` `(batch, condition_dim)`."""
        inner = self.conv_in(F.silu(self.norm_in(features)))
        inner = F.silu(self.film(self.norm_out(inner), condition))
        return self.shortcut(features) + self.conv_out(self.dropout(inner))


class ResidualStage(nn.Module):
    """Residual blocks of one resolution; the first takes the channels that come in."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        condition_dim: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_blocks - 1)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, out_channels, condition_dim, dropout) for width in widths
        )

    def forward(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """As `ResidualBlock`."""
        for block in self.blocks:
            features = block(features, condition)
        return features


class UpsampleTo(nn.Module):
    """Repeat pixels to a given size, then a 3x3 convolution; undoes a stride of 2 at odd sizes too."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, features: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Args: `features` `(batch, channels, height, width)`, `size` the wanted (height, width)."""
        return self.conv(F.interpolate(features, size=tuple(size), mode="nearest"))
