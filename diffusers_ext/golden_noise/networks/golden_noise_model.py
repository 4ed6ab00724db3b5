"""A residual transformer from noise and prompt to golden noise, for any size, aspect and prompt length."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from diffusers_ext.golden_noise.low_frequencies import from_coarse, match_low_frequencies, to_coarse
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork, check_channels, check_text

KeysValues = tuple[torch.Tensor, torch.Tensor]


def patch_positions(
    rows: int, columns: int, width: int, max_frequency: float, device: torch.device | None = None
) -> torch.Tensor:
    """Sine-cosine position of every patch, row by row, `(rows * columns, width)` float32.

    The fixed 2-D form of "Attention Is All You Need" (Vaswani et al., 2017, section 3.5), with `u = (index + 0.5) /
    count` in place of the index: sin and cos of `2 pi f u` per axis, the frequencies f spaced geometrically from 1/2
    cycle to `max_frequency` cycles a side: half the patches of a side at the size trained at, the finest wave that
    these patches can tell apart. Another size then samples the same waves more or less densely.
    """
    if width % 4:
        raise ValueError(f"`width` must be a multiple of 4 for 2-D positions, got {width}.")
    highest = math.log2(max(max_frequency, 0.5))
    frequencies = torch.logspace(-1, highest, width // 4, base=2.0, device=device)
    waves = []
    for count in (rows, columns):
        centres = (torch.arange(count, device=device) + 0.5) / count
        phases = 2 * math.pi * centres[:, None] * frequencies
        waves.append(torch.cat([phases.sin(), phases.cos()], 1))
    grid = (rows, columns, width // 2)
    vertical = waves[0][:, None].expand(grid)
    horizontal = waves[1][None, :].expand(grid)
    return torch.cat([vertical, horizontal], 2).flatten(0, 1)


class MultiHeadAttention(nn.Module):
    """softmax(Q K^T / sqrt(dim per head)) V over several heads ("Attention Is All You Need", 2017)."""

    def __init__(self, width: int, num_heads: int, context_width: int | None = None) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"`num_heads` must divide the width {width} of the tokens, got {num_heads}.")
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(context_width or width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def forward(
        self,
        tokens: torch.Tensor,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        past: KeysValues | None = None,
    ) -> tuple[torch.Tensor, KeysValues]:
        """Attend from `tokens` to `context`, or to themselves, and to the keys and values of the `past`.

        Tokens are `(batch, tokens, width)`; with the result come all keys and values, each `(batch, heads, keys, dim
        per head)`.
        """
        context = tokens if context is None else context
        query, key, value = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.to_q(tokens), *self.to_kv(context).chunk(2, dim=2))
        )
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(result.transpose(1, 2).flatten(2)), (key, value)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention if there is a context, feed-forward; each normed, each a residual."""

    def __init__(
        self, width: int, num_heads: int, feedforward: int, dropout: float = 0.0, context_width: int | None = None
    ) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = MultiHeadAttention(width, num_heads)
        self.norm_cross = self.cross_attention = None
        if context_width is not None:
            self.norm_cross = nn.LayerNorm(width)
            self.cross_attention = MultiHeadAttention(width, num_heads, context_width)
        self.norm_feedforward = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(nn.Linear(width, feedforward), nn.GELU(), nn.Linear(feedforward, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        past: KeysValues | None = None,
    ) -> tuple[torch.Tensor, KeysValues]:
        # `mask` and `past` belong to the self-attention.
        change, keys_values = self.self_attention(self.norm_self(tokens), mask=mask, past=past)
        tokens = tokens + self.dropout(change)
        if self.cross_attention is not None:
            normed = self.norm_cross(tokens)
            change, _ = self.cross_attention(normed, context, mask=context_mask)
            tokens = tokens + self.dropout(change)
        change = self.feedforward(self.norm_feedforward(tokens))
        return tokens + self.dropout(change), keys_values


class ReadText(NamedTuple):
    """A batch of prompts as the networks see them; the first token of each is the learned one."""

    tokens: torch.Tensor  # (batch, 1 + tokens, width)
    mask: torch.Tensor | None  # bool (batch, 1, 1, 1 + tokens), true where a token is read


class TextReader(nn.Module):
    """Project text embeddings to `width` and let the tokens see each other.

    A learned token that is always read comes first: attention then has something to read also where a mask hides every
    token of a prompt.
    """

    def __init__(
        self,
        text_embed_dim: int,
        width: int,
        *,
        num_layers: int,
        num_heads: int,
        feedforward: int,
        dropout: float = 0.0,
        projection_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(text_embed_dim)
        self.project = nn.Linear(projection_dim or text_embed_dim, width)
        if projection_dim is not None:
            self.project = nn.Sequential(nn.Linear(text_embed_dim, projection_dim, bias=False), self.project)
        self.first_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, feedforward, dropout) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(self, text_embed: torch.Tensor, attention_mask: torch.Tensor | None) -> ReadText:
        first = self.first_token.expand(len(text_embed), -1, -1)
        tokens = torch.cat([first, self.project(self.norm_in(text_embed))], 1)
        mask = None
        if attention_mask is not None:
            mask = F.pad(attention_mask != 0, (1, 0), value=True)[:, None, None]
        for block in self.blocks:
            tokens, _ = block(tokens, mask=mask)
        return ReadText(self.norm_out(tokens), mask)


class AttentionPooling(nn.Module):
    """One vector per prompt: the first token's view of all tokens, through a small MLP."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(width, num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, text: ReadText) -> torch.Tensor:
        pooled, _ = self.attention(text.tokens[:, :1], text.tokens, mask=text.mask)
        return self.mlp(pooled[:, 0])


class GoldenNoiseModel(GoldenNoiseNetwork, ModelMixin, ConfigMixin):
    """`golden = noise + head(transformer(patches of noise, tokens of the prompt))`.

    The head starts at zero, so an untrained network is the identity to the bit. Patches carry their position relative
    to the picture, and attention takes any number of them, so a network trained at one size runs at all. It learns the
    re-denoised change of "Golden Noise for Diffusion Models" (Zhou et al., arXiv:2411.09502); the defaults are the
    SDXL configuration, 9 M parameters.

    Args:
        in_channels: of the latents, 4 (SD, SDXL, Hunyuan-DiT), 16 (SD3, Flux, Qwen-Image, Z-Image) or 128 (FLUX.2).
        patch_size: latent pixels a side of one token.
        sample_size: latent pixels a side at the size trained at; it sets the finest position wave.
        bands: act on the lowest `bands` x `bands` frequencies alone, which the transformer reads as a noise of that
            size whatever the picture's; all others stay the seed's. `None`: on the noise itself.
        text_projection_dim: the text is brought to this width before it is brought to `width`, which takes fewer
            weights where a large language model wrote it; `None` brings it there at once.
    """

    _counted = ("num_layers",)

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
        bands: int | None = None,
        text_projection_dim: int | None = None,
    ) -> None:
        super().__init__()
        if bands is not None and (type(bands) is not int or bands < 1):
            raise ValueError(f"`bands` must be a number from 1 or None, got {bands!r}.")
        if text_projection_dim is not None and text_projection_dim < 1:
            raise ValueError(f"`text_projection_dim` must be at least 1 or None, got {text_projection_dim}.")
        patch = in_channels * patch_size**2
        if width < patch:
            raise ValueError(
                f"`width` must be at least the {patch} numbers of a patch, got {width}: a narrower "
                "token cannot hold its noise."
            )
        self.embed = nn.Linear(patch, width)
        self.text = TextReader(
            text_embed_dim, width, num_layers=0, num_heads=num_heads, feedforward=width,
            projection_dim=text_projection_dim,
        )  # fmt: skip
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
        """Golden noise before its spectrum is matched; shapes and errors as in `refine`."""
        config = self.config
        check_text(noise, prompt_embeds, attention_mask)
        check_channels(noise, prompt_embeds, config.in_channels, config.text_embed_dim)
        if config.bands is None:
            return noise + self._change(noise, config.sample_size, prompt_embeds, attention_mask)
        coarse = to_coarse(noise, config.bands)
        change = self._change(coarse, config.bands, prompt_embeds, attention_mask)
        return noise + from_coarse(change, noise.shape[-2:], config.bands)

    def _change(
        self, noise: torch.Tensor, sample_size: int, prompt_embeds: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        config = self.config
        patches, grid = to_patches(noise, config.patch_size)
        tokens = self.embed(patches) + patch_positions(
            *grid, config.width, sample_size / config.patch_size / 2, noise.device
        ).to(noise.dtype)
        text = self.text(prompt_embeds, attention_mask)
        for block in self.blocks:
            tokens, _ = block(tokens, text.tokens, context_mask=text.mask)
        change = from_patches(self.head(self.norm(tokens)), grid, config.patch_size)
        return change[..., : noise.shape[-2], : noise.shape[-1]]

    def match_energy(self, golden: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Of all frequencies, or of the lowest `bands` alone."""
        if self.config.bands is None:
            return super().match_energy(golden, source)
        return match_low_frequencies(golden, source, self.config.bands)

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
    """Patches `(batch, rows * columns, channels * patch_size**2)` of latents padded with zeros, and their grid."""
    missing = [-side % patch_size for side in latents.shape[-2:]]
    latents = F.pad(latents, (0, missing[1], 0, missing[0]))
    grid = latents.shape[-2] // patch_size, latents.shape[-1] // patch_size
    # `unfold` gives (batch, numbers of a patch, patches): channel by channel, each row by row.
    return F.unfold(latents, patch_size, stride=patch_size).transpose(1, 2), grid


def from_patches(patches: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """The inverse of `to_patches`, with the padding still there."""
    size = grid[0] * patch_size, grid[1] * patch_size
    return F.fold(patches.transpose(1, 2), size, patch_size, stride=patch_size)
