"""The forward pass of transformers' Swin without gradients, at the speed the processor allows."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SwinModel
from transformers.models.swin.modeling_swin import SwinAttention, SwinLayer


def has_hooks(module: nn.Module) -> bool:
    """Whether a part of the module has its weights brought in by a hook when it is called.

    Such hooks, of accelerate and of diffusers, put a `forward` of their own on the instance.
    """
    return any("forward" in vars(part) for part in module.modules())


_CACHED_NUMBERS = 160_000  # of the tokens that go through a layer together


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


@lru_cache(maxsize=64)
def window_order(size: int, window: int, shift: int, device: torch.device) -> torch.Tensor:
    """Tokens in raster order -> tokens window by window, of a `size x size` map rolled by `shift`."""
    tokens = torch.arange(size * size, device=device).view(size, size)
    rolled = tokens.roll((-shift, -shift), (0, 1))
    tiles = rolled.view(size // window, window, size // window, window)
    return tiles.transpose(1, 2).flatten()


@lru_cache(maxsize=64)
def quad_order(size: int, device: torch.device) -> torch.Tensor:
    """Tokens in raster order -> the four of each 2x2 square together, down before right."""
    tokens = torch.arange(size * size, device=device).view(size // 2, 2, size // 2, 2)
    return tokens.permute(0, 2, 3, 1).flatten()


@lru_cache(maxsize=64)
def reordering(size: int, window: int, before: int | None, after: int | str, device: torch.device) -> torch.Tensor:
    """Index from one order of tokens to another.

    Args:
        before: the shift of the windows, `None` for raster order.
        after: the shift of the windows, `"raster"` or `"quads"`.
    """
    raster = torch.arange(size * size, device=device)
    if isinstance(after, int):
        wanted = window_order(size, window, after, device)
    else:
        wanted = raster if after == "raster" else quad_order(size, device)
    if before is None:
        return wanted
    return window_order(size, window, before, device).argsort()[wanted]


@lru_cache(maxsize=64)
def shift_mask(size: int, window: int, shift: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`(windows, 1, window ** 2, window ** 2)`: -100 between tokens that only the roll made meet."""
    place = torch.arange(size, device=device)
    region = (place >= size - window).long() + (place >= size - shift).long()
    regions = (3 * region[:, None] + region[None, :]).view(size // window, window, size // window, window)
    labels = regions.transpose(1, 2).reshape(-1, window * window)
    apart = labels[:, None, :] != labels[:, :, None]
    return (apart.to(dtype) * -100)[:, None]


def position_bias(attention: SwinAttention) -> torch.Tensor:
    """`(1, heads, window ** 2, window ** 2)`, contiguous at once."""
    bias = attention.relative_position_bias
    if not is_bare(bias):
        return bias()
    by_head = bias.relative_position_bias_table.t().contiguous()
    flat = by_head.index_select(1, bias.relative_position_index)
    return flat.view(1, -1, bias.window_area, bias.window_area)


def swin_layer(layer: SwinLayer, windows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A Swin layer on any number of its windows `(windows, area, dim)`; `bias` is added to the scores."""
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
    """The last hidden state of a Swin in evaluation mode.

    The same as `model(pixels).last_hidden_state`. Tokens stay in the order of the windows they are attended in: from
    one layer to the next they move once, where rolling, partitioning and back is four copies; masks and orders are
    made once per size.

    Args:
        model: at every stage, the side of the map is a multiple of the window.
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
