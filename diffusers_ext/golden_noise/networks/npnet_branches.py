"""The two branches of NPNet: a Swin transformer's look at the noise, and a change of its singular values.

The Swin is transformers'; without gradients its forward pass runs here, at the speed the processor allows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers import SwinConfig, SwinModel
from transformers.models.swin.modeling_swin import SwinAttention, SwinLayer

from diffusers_ext.golden_noise.networks.swin import DropPath, reordering, shift_mask, swin_model

# Below this share of the largest singular value the Gram matrix has lost too many digits.
_RANK_TOLERANCE = 1e-6
_CACHED_NUMBERS = 160_000  # of the tokens that go through a layer together


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook of accelerate or diffusers, which put a `forward` on the instance, brings in weights."""
    return any("forward" in vars(part) for part in module.modules())


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module does nothing but its class's forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module)


def linear(layer: nn.Linear, x: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    """`layer(x)` without gradients, and the exact GELU of it when asked.

    On processors without Intel's name the MKL kernel behind `F.linear` runs at half the speed of oneDNN's, which this
    calls for float32 on the CPU. Layers with hooks or in the wrapping of an adapter or of offloading run as they are.
    """
    plain = type(layer) is nn.Linear and is_bare(layer) and not torch.is_grad_enabled()
    fits = x.device.type == "cpu" and x.dtype == layer.weight.dtype == torch.float32
    if plain and fits and torch.backends.mkldnn.is_available():
        after = ("gelu", [], "none") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, *after)
    x = layer(x)
    return F.gelu(x) if gelu else x


def position_bias(attention: SwinAttention) -> torch.Tensor:
    """`(1, heads, window ** 2, window ** 2)`, contiguous at once."""
    bias = attention.relative_position_bias
    if not is_bare(bias):
        return bias()
    by_head = bias.relative_position_bias_table.t().contiguous()
    flat = by_head.index_select(1, bias.relative_position_index)
    return flat.view(1, -1, bias.window_area, bias.window_area)


def swin_layer(layer: SwinLayer, windows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A Swin layer on windows `(count, area, dim)`; `bias` is added to the scores."""
    attention = layer.attention
    count, area, dim = windows.shape
    normed = layer.layernorm_before(windows)
    q, k, v = (
        linear(projection, normed).view(count, area, bias.shape[1], -1).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scaling)
    mixed = mixed.transpose(1, 2).reshape(count, area, dim)
    x = linear(attention.o_proj, mixed).add_(windows)
    hidden = linear(layer.mlp.fc1, layer.layernorm_after(x), gelu=True)
    return linear(layer.mlp.fc2, hidden).add_(x)


def in_groups(layer: SwinLayer, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A Swin layer on tokens in window order, as many windows at a time as a core's cache holds."""
    batch, _, dim = x.shape
    bias = position_bias(layer.attention)
    area = bias.shape[-1]
    windows = x.reshape(-1, area, dim)
    if mask is not None:
        bias = bias + mask
        bias = bias if batch == 1 else bias.repeat(batch, 1, 1, 1)
    group = len(windows)
    if x.device.type == "cpu":
        group = max(1, _CACHED_NUMBERS * torch.get_num_threads() // (area * dim))
    parts = windows.split(group)
    biases = [bias] * len(parts) if len(bias) == 1 else bias.split(group)
    return torch.cat([swin_layer(layer, *part) for part in zip(parts, biases)]).view(x.shape)


@torch.no_grad()
def swin_features(model: SwinModel, pixels: torch.Tensor) -> torch.Tensor:
    """`model(pixels).last_hidden_state` in evaluation mode, where windows tile the map of every stage.

    Tokens stay in the order of the windows they are attended in: from one layer to the next they move once, where
    rolling, partitioning and back is four copies; masks and orders are made once per size.
    """
    x = model.embeddings.patch_embeddings.projection(pixels)
    size = x.shape[-1]
    x = model.embeddings.norm(x.flatten(2).transpose(1, 2))
    device = x.device
    for stage in model.encoder.layers:
        order = None
        for index, layer in enumerate(stage.blocks):
            window = model.config.window_size
            shift = window // 2 if index % 2 and size > window else 0
            x = x.index_select(1, reordering(size, window, order, shift, device))
            order = shift
            mask = shift_mask(size, window, shift, x.dtype, device) if shift else None
            x = in_groups(layer, x, mask)
        merging = stage.downsample
        after = "raster" if merging is None else "quads"
        x = x.index_select(1, reordering(size, window, order, after, device))
        if merging is not None:
            x = linear(merging.reduction, merging.norm(x.view(len(x), -1, 4 * x.shape[-1])))
            size //= 2
    return model.layernorm(x)


class NoiseTransformer(nn.Module):
    """Noise -> resized to Swin's image -> Swin -> resized to the noise (arXiv:2411.09502, Sec. 3).

    The official code reads Swin's `(batch, rows, columns, dim)` as `(batch, channels, height, width)`: rows become
    channels, columns become bands of rows, and every few features become the columns of the output. All published
    weights were trained that way, so it is kept.

    Args:
        adapter: the design document's `nt_adapter`: a residual convolution block before the Swin that starts as the
            identity.
        finetune: `nt_finetune`: of the Swin only the last two stages are trained; otherwise all.
        dropout: `nt_dropout`: whole channels of the output are dropped in training.
    """

    def __init__(
        self, in_channels: int, sample_size: int, swin: SwinConfig, *, adapter: bool, finetune: bool, dropout: bool
    ) -> None:
        super().__init__()
        self.sample_size, self.image_size = sample_size, swin.image_size
        last = swin.patch_size * 2 ** (len(swin.depths) - 1)
        if swin.image_size % last or (swin.image_size // last) % swin.window_size:
            raise ValueError(
                f"`swin_image_size` must be a multiple of patch * 2^(stages - 1) * window = "
                f"{last * swin.window_size}, got {swin.image_size}."
            )
        self.grid_size = swin.image_size // last  # the side of the last stage's map
        self.downconv = nn.Conv2d(in_channels, 3, 1)
        self.adapter = None
        if adapter:
            self.adapter = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 3, 1))
            nn.init.zeros_(self.adapter[-1].weight)
            nn.init.zeros_(self.adapter[-1].bias)
        self.swin = swin_model(swin)
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


class NoiseCrossAttention(nn.Module):
    """The design document's `cross_attention`: the Swin branch attends to the text-scaled noise, place by place."""

    def __init__(self, channels: int, num_heads: int = 8, head_dim: int = 64) -> None:
        super().__init__()
        self.attention = Attention(channels, cross_attention_dim=channels, heads=num_heads, dim_head=head_dim)
        # A residual that starts at zero.
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
    of it (`"backend"`: that of `torch.linalg.svd` in float32). `"canonical"` makes the entry of largest magnitude of
    each left vector positive; float64 leaves that choice to the noise alone. There the vectors come from the
    eigenvectors of `A^T A` (`u = A v / s`): in float64 that is more exact than the decomposition of `A` in float32, in
    about its time.
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


class PooledAttention(nn.Module):
    """The mean over tokens of self-attention without a residual connection.

    The mean is taken of the attention weights: the same by linearity, without the work of one output a token.
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

    `dropout`, the design document's `svd_dropout`, is LayerNorm, GELU and dropout in the networks, as wide as the side
    of the matrix in place of `hidden_dim`, and the attention as a residual path with stochastic depth.
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
