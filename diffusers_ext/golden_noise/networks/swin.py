"""The Swin transformer of NPNet: that of transformers, or one of the same names for transformers below 5.9.

Before 5.9 its layers had other names, which are those of saved weights, and no place for what NPNet computes itself.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SwinConfig, SwinModel
from transformers.models.swin import modeling_swin

_STD = 0.02  # of new weights


def swin_model(config: SwinConfig) -> nn.Module:
    """A Swin with the names of transformers 5.9, whichever version is installed."""
    if hasattr(modeling_swin, "SwinRelativePositionBias"):
        return SwinModel(config, add_pooling_layer=False)
    return Swin(config)


def window_order(size: int, window: int, shift: int, device: torch.device) -> torch.Tensor:
    """Tokens in raster order -> tokens window by window, of a `size x size` map rolled by `shift`."""
    tokens = torch.arange(size * size, device=device).view(size, size)
    rolled = tokens.roll((-shift, -shift), (0, 1))
    tiles = rolled.view(size // window, window, size // window, window)
    return tiles.transpose(1, 2).flatten()


def quad_order(size: int, device: torch.device) -> torch.Tensor:
    """Tokens in raster order -> the four of each 2x2 square together, down before right."""
    tokens = torch.arange(size * size, device=device).view(size // 2, 2, size // 2, 2)
    return tokens.permute(0, 2, 3, 1).flatten()


def reordering(size: int, window: int, before: int | None, after: int | str, device: torch.device) -> torch.Tensor:
    """Index from one order of tokens to another: a shift of windows, `None` or `"raster"`, or `"quads"`."""
    if isinstance(after, int):
        wanted = window_order(size, window, after, device)
    elif after == "quads":
        wanted = quad_order(size, device)
    else:
        wanted = torch.arange(size * size, device=device)
    if before is None:
        return wanted
    return window_order(size, window, before, device).argsort()[wanted]


def shift_mask(size: int, window: int, shift: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`(windows, 1, window ** 2, window ** 2)`: -100 between tokens that only the roll made meet."""
    place = torch.arange(size, device=device)
    region = (place >= size - window).long() + (place >= size - shift).long()
    regions = (3 * region[:, None] + region[None, :]).view(size // window, window, size // window, window)
    labels = regions.transpose(1, 2).reshape(-1, window * window)
    apart = labels[:, None, :] != labels[:, :, None]
    return (apart.to(dtype) * -100)[:, None]


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


class RelativePositionBias(nn.Module):
    """A learned number for each head and each distance of two places in a window."""

    def __init__(self, heads: int, window: int) -> None:
        super().__init__()
        self.window_area = window**2
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        rows, columns = (place.flatten() for place in torch.meshgrid([torch.arange(window)] * 2, indexing="ij"))
        down, right = (x[:, None] - x[None, :] + window - 1 for x in (rows, columns))
        index = (down * (2 * window - 1) + right).view(-1)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self) -> torch.Tensor:
        """`(1, heads, area, area)`."""
        bias = self.relative_position_bias_table[self.relative_position_index]
        return bias.view(self.window_area, self.window_area, -1).permute(2, 0, 1).contiguous()[None]


class WindowAttention(nn.Module):
    """Attention within windows."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.scaling = (dim // heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.relative_position_bias = RelativePositionBias(heads, window)

    def forward(self, windows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Of `(count, area, dim)`; `mask` is `(windows of a map, 1, area, area)`."""
        bias = self.relative_position_bias()
        if mask is not None:
            bias = (bias + mask).repeat(len(windows) // len(mask), 1, 1, 1)
        shape = (*windows.shape[:2], bias.shape[1], -1)
        q, k, v = (x(windows).view(shape).transpose(1, 2) for x in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scaling)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """Attention and MLP, both residual."""

    def __init__(self, config: SwinConfig, dim: int, heads: int, rate: float) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = WindowAttention(dim, heads, config.window_size)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = Mlp(dim, int(config.mlp_ratio * dim))
        self.drop_path = DropPath(rate)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Of tokens `(batch, tokens, dim)` in the order of windows."""
        windows = x.reshape(-1, self.attention.relative_position_bias.window_area, x.shape[-1])
        mixed = self.attention(self.layernorm_before(windows), mask).view(x.shape)
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.layernorm_after(x)))


class Merging(nn.Module):
    """The four tokens of each 2x2 square become one of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of tokens square by square."""
        return self.reduction(self.norm(x.reshape(len(x), -1, 4 * x.shape[-1])))


class Swin(nn.Module):
    """`SwinModel` without pooling, for maps that windows tile at every stage."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        dims = [config.embed_dim * 2**stage for stage in range(len(config.depths))]
        count = sum(config.depths)
        rates = [config.drop_path_rate * layer / max(count - 1, 1) for layer in range(count)]
        projection = nn.Conv2d(config.num_channels, dims[0], config.patch_size, config.patch_size)
        self.embeddings = nn.ModuleDict(
            {"patch_embeddings": nn.ModuleDict({"projection": projection}), "norm": nn.LayerNorm(dims[0])}
        )
        stages = []
        for index, (dim, depth, heads) in enumerate(zip(dims, config.depths, config.num_heads)):
            blocks = nn.ModuleList(Layer(config, dim, heads, rates.pop(0)) for _ in range(depth))
            merging = Merging(dim) if index < len(dims) - 1 else None
            stages.append(Stage(blocks, merging))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(stages)})
        self.layernorm = nn.LayerNorm(dims[-1], eps=config.layer_norm_eps)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pixels: torch.Tensor) -> SimpleNamespace:
        """`last_hidden_state`, `(batch, tokens, dim)`."""
        x = self.embeddings.patch_embeddings.projection(pixels)
        size = x.shape[-1]
        x = self.embeddings.norm(x.flatten(2).transpose(1, 2))
        for stage in self.encoder.layers:
            x = stage(x, size, self.config.window_size)
            size //= 2
        return SimpleNamespace(last_hidden_state=self.layernorm(x))


class Stage(nn.Module):
    """Layers of one size, every second of which sees windows that are shifted by half."""

    def __init__(self, blocks: nn.ModuleList, merging: Merging | None) -> None:
        super().__init__()
        self.blocks, self.downsample = blocks, merging

    def forward(self, x: torch.Tensor, size: int, window: int) -> torch.Tensor:
        """Of the tokens of a `size x size` map in raster order."""
        order = None
        for index, layer in enumerate(self.blocks):
            shift = window // 2 if index % 2 and size > window else 0
            x = x.index_select(1, reordering(size, window, order, shift, x.device))
            order = shift
            x = layer(x, shift_mask(size, window, shift, x.dtype, x.device) if shift else None)
        after = "raster" if self.downsample is None else "quads"
        x = x.index_select(1, reordering(size, window, order, after, x.device))
        return x if self.downsample is None else self.downsample(x)
