"""A recurrent network over noise sequences: residual convolutions, a GRU at every place, FiLM by the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from diffusers_ext.golden_noise.networks.golden_noise_model import (
    AttentionPooling,
    ReadText,
    TextReader,
    TransformerBlock,
    patch_positions,
)
from diffusers_ext.golden_noise.networks.sequence_transformer import NoiseSequenceNetwork

MOST_GROUPS = 16


class FiLM(nn.Module):
    """`(1 + gamma) * features + beta`, with gamma and beta a linear function of the condition.

    Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer" (2018), with their `1 + gamma` form; the
    linear map starts at zero, so training starts from unchanged features.
    """

    def __init__(self, condition_dim: int, channels: int) -> None:
        super().__init__()
        self.gamma_beta = nn.Linear(condition_dim, 2 * channels)
        nn.init.zeros_(self.gamma_beta.weight)
        nn.init.zeros_(self.gamma_beta.bias)

    def forward(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        gamma, beta = self.gamma_beta(condition)[:, :, None, None].chunk(2, dim=1)
        return (1 + gamma) * features + beta


def group_norm(channels: int) -> nn.GroupNorm:
    """As many groups as divide `channels`, at most 16."""
    return nn.GroupNorm(math.gcd(MOST_GROUPS, channels), channels)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, with FiLM after the second norm, plus the input.

    The pre-activation order of He et al., "Identity Mappings in Deep Residual Networks" (2016).
    """

    def __init__(self, in_channels: int, out_channels: int, condition_dim: int, dropout: float = 0.0) -> None:
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
        inner = self.conv_in(F.silu(self.norm_in(features)))
        inner = F.silu(self.film(self.norm_out(inner), condition))
        return self.shortcut(features) + self.conv_out(self.dropout(inner))


class ResidualStage(nn.Module):
    """Residual blocks of one resolution; the first takes the channels that come in."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, condition_dim: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_blocks - 1)
        self.blocks = nn.ModuleList(ResidualBlock(width, out_channels, condition_dim, dropout) for width in widths)

    def forward(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            features = block(features, condition)
        return features


class UpsampleTo(nn.Module):
    """Repeat pixels to a given size, then a 3x3 convolution; undoes a stride of 2 at odd sizes too."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, features: torch.Tensor, size: torch.Size) -> torch.Tensor:
        return self.conv(F.interpolate(features, size=tuple(size), mode="nearest"))


class PooledText(NamedTuple):
    """The prompt for cross-attention and for everything that takes one vector."""

    read: ReadText
    pooled: torch.Tensor  # (batch, cnn_feat_dim)


class NoiseSequenceRNN(NoiseSequenceNetwork, ModelMixin, ConfigMixin):
    """ResNet encoder and decoder with skips, attention and a GRU at their lowest resolution.

    Noise has no shorter description than itself, so nothing passes through one vector: the GRU keeps one state a place
    of the lowest resolution, with the same weights everywhere, and finer detail reaches the decoder by the encoder's
    features of that resolution. FiLM brings the prompt into every block, the GRU and cross-attention read it, too. The
    last convolution starts at zero: with `predict_residual` an untrained network is the identity. Any height and
    width.

    Args:
        sample_size: side of the latents trained at, in latent pixels.
        cnn_base_filters: channels of the first stage; each further one doubles them and halves the resolution.
        cnn_num_blocks: residual blocks of each stage.
        cnn_feat_dim: width of attention and pooled text at the lowest resolution.
        gru_hidden_size: of the state a place.
        predict_variance: predict a log-variance for every value, too.
        predict_residual: predict the change of a state instead of the next state.
        pooled_text: read pooled text embeddings `(batch, dim)` instead of one embedding a token.
    """

    _counted = ("cnn_num_blocks", "gru_num_layers", "num_attention_layers", "num_text_layers")

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 128,
        cnn_base_filters: int = 64,
        cnn_num_blocks: Sequence[int] = (2, 2, 2, 2),
        cnn_feat_dim: int = 512,
        gru_hidden_size: int = 512,
        gru_num_layers: int = 2,
        text_embed_dim: int = 2048,
        num_attention_heads: int = 8,
        num_attention_layers: int = 2,
        num_text_layers: int = 1,
        dropout: float = 0.0,
        num_steps: int = 5,
        predict_variance: bool = False,
        predict_residual: bool = True,
        pooled_text: bool = False,
    ) -> None:
        super().__init__()
        if not cnn_num_blocks or min(cnn_num_blocks) < 1:
            raise ValueError(f"`cnn_num_blocks` must give each stage a block, got {tuple(cnn_num_blocks)}.")
        if num_steps < 1:
            raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
        widths = [cnn_base_filters * 2**stage for stage in range(len(cnn_num_blocks))]
        self.text_reader = TextReader(
            text_embed_dim,
            cnn_feat_dim,
            num_layers=num_text_layers,
            num_heads=num_attention_heads,
            feedforward=2 * cnn_feat_dim,
            dropout=dropout,
        )
        self.pool_text = AttentionPooling(cnn_feat_dim, num_attention_heads)
        self._build_encoder(in_channels, widths)
        self.project_in = nn.Conv2d(widths[-1], cnn_feat_dim, 1)
        self.project_positions = nn.Linear(cnn_feat_dim, cnn_feat_dim)
        self.attention = nn.ModuleList(
            TransformerBlock(cnn_feat_dim, num_attention_heads, 2 * cnn_feat_dim, dropout, context_width=cnn_feat_dim)
            for _ in range(num_attention_layers)
        )
        self.gru = nn.GRU(2 * cnn_feat_dim, gru_hidden_size, gru_num_layers, batch_first=True)
        self.project_out = nn.Linear(cnn_feat_dim + gru_hidden_size, widths[-1])
        self._build_decoder(in_channels * (2 if predict_variance else 1), widths)
        if predict_residual:
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)

    def _build_encoder(self, in_channels: int, widths: list[int]) -> None:
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.downsamplers = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in pairwise(widths)
        )
        self.encoder = self._stages(widths, widths)

    def _build_decoder(self, out_channels: int, widths: list[int]) -> None:
        self.upsamplers = nn.ModuleList(UpsampleTo(coarse, fine) for fine, coarse in pairwise(widths))
        self.decoder = self._stages([2 * width for width in widths], widths)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def _stages(self, in_channels: list[int], out_channels: list[int]) -> nn.ModuleList:
        config = self.config
        return nn.ModuleList(
            ResidualStage(*sizes, config.cnn_feat_dim, config.dropout)
            for sizes in zip(in_channels, out_channels, config.cnn_num_blocks, strict=True)
        )

    def read_text(self, text_embed: torch.Tensor, attention_mask: torch.Tensor | None) -> PooledText:
        """Tokens for cross-attention, and one vector for FiLM and GRU."""
        if self.config.pooled_text:
            text_embed = text_embed[:, None]
        read = self.text_reader(text_embed, attention_mask)
        return PooledText(read, self.pool_text(read))

    def predict_frames(
        self, frames: torch.Tensor, text: PooledText, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Only the GRU, whose state is the memory, looks along the sequence; all frames pass the rest as one batch."""
        steps = frames.shape[1]
        condition = text.pooled.repeat_interleave(steps, 0)
        features = self.conv_in(frames.flatten(0, 1))
        skips = []
        for level, stage in enumerate(self.encoder):
            if level:
                features = self.downsamplers[level - 1](features)
            features = stage(features, condition)
            skips.append(features)
        features, memory = self._recur(features, text, steps, memory)
        for level in reversed(range(len(skips))):
            skip = skips[level]
            features = self.decoder[level](torch.cat([features, skip], 1), condition)
            if level:
                features = self.upsamplers[level - 1](features, skips[level - 1].shape[-2:])
        output = self.conv_out(F.silu(self.norm_out(features)))
        return output.unflatten(0, (-1, steps)), memory

    def _check_input(self, noise: torch.Tensor, text_embed: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        if self.config.pooled_text:
            if text_embed.ndim != 2 or attention_mask is not None:
                raise ValueError(
                    "`text_embed` must be (batch, dim) without `attention_mask` for a network with "
                    f"`pooled_text`, got {tuple(text_embed.shape)}."
                )
            text_embed = text_embed[:, None]
        super()._check_input(noise, text_embed, attention_mask)

    def _recur(
        self, features: torch.Tensor, text: PooledText, steps: int, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention within each frame, then the GRU along the steps of each place."""
        rows, columns = features.shape[-2:]
        coarsest = self.config.sample_size / 2 ** len(self.downsamplers)
        places = patch_positions(rows, columns, self.config.cnn_feat_dim, coarsest / 2, features.device)
        tokens = self.project_in(features).flatten(2).transpose(1, 2)
        tokens = tokens + self.project_positions(places.to(tokens.dtype))
        context = text.read.tokens.repeat_interleave(steps, 0)
        mask = None if text.read.mask is None else text.read.mask.repeat_interleave(steps, 0)
        for block in self.attention:
            tokens, _ = block(tokens, context, context_mask=mask)
        condition = text.pooled.repeat_interleave(steps, 0)[:, None].expand_as(tokens)
        # Places become the batch of the GRU: (batch * steps, places, dim) to (batch * places, steps, dim).
        given = torch.cat([tokens, condition], 2).unflatten(0, (-1, steps)).transpose(1, 2)
        hidden, memory = self.gru(given.flatten(0, 1).contiguous(), memory)
        hidden = hidden.unflatten(0, (-1, rows * columns)).transpose(1, 2).flatten(0, 1)
        change = self.project_out(torch.cat([tokens, hidden], 2))
        return features + change.transpose(1, 2).unflatten(2, (rows, columns)), memory
