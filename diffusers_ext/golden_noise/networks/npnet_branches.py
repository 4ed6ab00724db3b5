"""The two branches of NPNet: a Swin transformer's look at the noise, and a change of its singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers import SwinConfig, SwinModel

from diffusers_ext.golden_noise.networks.swin import has_hooks, linear, swin_features

# Below this share of the largest singular value the Gram matrix has lost too many digits.
_RANK_TOLERANCE = 1e-6


class NoiseTransformer(nn.Module):
    """Noise -> resized to Swin's image -> Swin -> resized to the noise (arXiv:2411.09502, Sec. 3).

    The official code reads Swin's `(batch, rows, columns, dim)` as `(batch, channels, height, width)`: rows become
    channels, columns become bands of rows, and every few features become the columns of the output. All published
    weights were trained that way, so it is kept.

    Args:
        image_size: of the Swin, in pixels.
        embed_dim: width of the first stage; each further stage doubles it.
        window_size: in patches; divides the side of the map of every stage.
        adapter: the design document's `nt_adapter`: a residual convolution block before the Swin that starts as the
            identity.
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
            self.adapter = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 3, 1))
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

    Each position of the branch's output is a query, each position of the text-scaled noise a key; a residual that
    starts at zero.
    """

    def __init__(self, channels: int, num_heads: int = 8, head_dim: int = 64) -> None:
        super().__init__()
        self.attention = Attention(channels, cross_attention_dim=channels, heads=num_heads, dim_head=head_dim)
        nn.init.zeros_(self.attention.to_out[0].weight)
        nn.init.zeros_(self.attention.to_out[0].bias)

    def forward(self, features: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        queries, keys = (x.flatten(2).transpose(1, 2) for x in (features, context))
        mixed = self.attention(queries, encoder_hidden_states=keys)
        return features + mixed.transpose(1, 2).reshape(features.shape)


class SingularParts(NamedTuple):
    """`matrix = u @ diag(s) @ vh`, singular values falling."""

    u: torch.Tensor  # (batch, side, side), left vectors in columns
    s: torch.Tensor  # (batch, side)
    vh: torch.Tensor  # (batch, side, side), right vectors in rows


def noise_to_matrix(noise: torch.Tensor) -> torch.Tensor:
    """Lay the channels out as a square of tiles, `(batch, tiles * height, tiles * width)`, row by row."""
    batch, channels, height, width = noise.shape
    tiles = math.isqrt(channels)
    grid = noise.reshape(batch, tiles, tiles, height, width).transpose(2, 3)
    return grid.reshape(batch, tiles * height, tiles * width)


def matrix_to_noise(matrix: torch.Tensor, channels: int) -> torch.Tensor:
    """The inverse of `noise_to_matrix`."""
    tiles = math.isqrt(channels)
    batch, height, width = len(matrix), matrix.shape[1] // tiles, matrix.shape[2] // tiles
    grid = matrix.reshape(batch, tiles, height, tiles, width).transpose(2, 3)
    return grid.reshape(batch, channels, height, width)


@torch.no_grad()
def singular_parts(matrix: torch.Tensor, signs: str = "canonical") -> SingularParts:
    """Singular value decomposition of square matrices.

    A pair of vectors is only given up to a common sign, and which one a LAPACK build or a GPU returns is an accident
    of it. `"canonical"` makes the entry of largest magnitude of each left vector positive; float64 leaves that choice
    to the noise alone. There the vectors come from the eigenvectors of `A^T A` (`u = A v / s`): in float64 that is
    more exact than the decomposition of `A` in float32, in about its time.

    Args:
        signs: `"canonical"`, or `"backend"` for those of `torch.linalg.svd` in float32.
    """
    if signs == "backend":
        return SingularParts(*(x.to(matrix.dtype) for x in torch.linalg.svd(matrix.float())))
    a = matrix.double()
    values, v = torch.linalg.eigh(a.mT @ a)  # rising
    s = values.clamp(min=0).sqrt()
    if bool((s[:, 0] > _RANK_TOLERANCE * s[:, -1]).all()):
        vh = v.mT
        uh = vh @ a.mT / s[:, :, None]
    else:
        u, s, vh = torch.linalg.svd(a)
        uh, s, vh = (x.flip(1) for x in (u.mT, s, vh))
    sign = uh.gather(2, uh.abs().argmax(2, keepdim=True)).sign()
    uh, s, vh = (x.to(matrix.dtype).flip(1) for x in (uh * sign, s, vh * sign))
    return SingularParts(uh.mT, s, vh)


class DropPath(nn.Module):
    """Drops a residual path for whole samples in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class PooledAttention(nn.Module):
    """The mean over tokens of self-attention without a residual connection.

    The mean is taken of the attention weights, before values and projection: the same result by linearity, without the
    work of one output a token. Dropout takes the pooled output.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        shape = (*tokens.shape[:2], 3, self.num_heads, -1)
        q, k, v = linear(self.qkv, tokens).view(shape).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        mixed = weights.mean(-2, keepdim=True) @ v
        return F.dropout(self.proj(mixed.flatten(1)), self.dropout, self.training)


def mlp(in_dim: int, hidden_dim: int, dropout: float) -> nn.Sequential:
    """Two linear layers back to `in_dim`; with `dropout` the regularised form of `svd_dropout`."""
    first, last = nn.Linear(in_dim, hidden_dim), nn.Linear(hidden_dim, in_dim)
    if not dropout:
        return nn.Sequential(first, nn.ReLU(), last)
    return nn.Sequential(first, nn.LayerNorm(hidden_dim), nn.GELU(), nn.Dropout(dropout), last)


class SVDBranch(nn.Module):
    """`U diag(s + f(U, s, V)) V^T` of a noise laid out as one matrix (arXiv:2411.09502, Sec. 3).

    The i-th token is the sum of what small networks make of the i-th left vector, of the i-th right vector and of all
    singular values. The singular parts are constants of the noise: nothing is differentiated through a decomposition.

    Args:
        hidden_dim: inside the networks of the vectors; the side of the matrix with `dropout`.
        num_heads: of the attention over tokens; divides the side of the matrix.
        dropout: the design document's `svd_dropout`: LayerNorm, GELU and dropout in the networks, and the attention as
            a residual path with stochastic depth.
    """

    def __init__(
        self,
        in_channels: int,
        sample_size: int,
        *,
        hidden_dim: int = 64,
        output_dim: int = 1024,
        num_heads: int = 8,
        dropout: bool = False,
        signs: str = "canonical",
    ) -> None:
        super().__init__()
        side = math.isqrt(in_channels) * sample_size
        self.signs = signs
        width, rate = (side, 0.2) if dropout else (hidden_dim, 0.0)
        self.left_mlp = mlp(side, width, rate)
        self.right_mlp = mlp(side, width, rate)
        self.value_mlp = mlp(side, width, rate) if dropout else nn.Linear(side, side)
        self.attention = PooledAttention(side, num_heads, qkv_bias=dropout, dropout=0.1 if dropout else 0.0)
        self.drop_path = DropPath(0.1) if dropout else None
        self.output_mlp = mlp(side, output_dim, 0.3 if dropout else 0.0)

    def value_changes(self, parts: SingularParts) -> torch.Tensor:
        """What the network adds to the singular values, `(batch, side)`."""
        tokens = self.left_mlp(parts.u.mT) + self.right_mlp(parts.vh)
        tokens = tokens + self.value_mlp(parts.s)[:, None]
        pooled = self.attention(tokens)
        if self.drop_path is not None:
            pooled = tokens.mean(1) + self.drop_path(pooled)
        return self.output_mlp(pooled)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        parts = singular_parts(noise_to_matrix(noise), self.signs)
        changes = self.value_changes(parts)
        # The same as rebuilding from the changed values, without the error of rebuilding `noise`.
        change = (parts.u * changes[:, None, :]) @ parts.vh
        return noise + matrix_to_noise(change, noise.shape[1])
