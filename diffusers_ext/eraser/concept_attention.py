"""How strongly each video token looks at a concept's tokens, read while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb


Rotary = tuple[torch.Tensor, torch.Tensor]


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    token_mask: torch.Tensor,
    *,
    chunk_size: int = 1024,
    per_head: bool = False,
) -> torch.Tensor:
    """Share of the video tokens' attention that lands on chosen text tokens.

    `sum over concept tokens j of softmax_j(q_i k_j^T / sqrt(head_dim))`, the softmax over all text
    and video keys: the output of the same attention with `value_j = 1` at the concept's tokens and
    0 elsewhere, so that fused kernels compute it and no score matrix is kept.

    Args:
        query, key: `(batch, heads, text + video, head_dim)`, text first, after normalisation and
            rotary embedding.
        token_mask: `(batch, text)` bool, true at the concept's tokens.
        chunk_size: video queries at a time; it bounds the scores where no fused kernel serves.
        per_head: keep the heads apart.

    Returns:
        `(batch, video)` float32, or `(batch, heads, video)`, from 0 to 1.
    """
    text = token_mask.shape[1]
    # As wide as the keys: flash kernels ask for one width.
    value = key.new_zeros(key.shape[0], 1, *key.shape[2:])
    value[:, 0, :text, 0] = token_mask.to(key)
    value = value.expand(-1, key.shape[1], -1, -1)
    chunks = query[:, :, text:].split(chunk_size, dim=2)
    shares = [F.scaled_dot_product_attention(chunk, key, value)[..., 0].float() for chunk in chunks]
    mass = torch.cat(shares, dim=2)
    return mass if per_head else mass.mean(dim=1)


def rotate_video(features: torch.Tensor, rotary: Rotary | None, text: int) -> torch.Tensor:
    """Rotary embedding of the video part, as CogVideoX applies it.

    Args:
        features: `(batch, heads, text + video, head_dim)` queries or keys; not written to.
        rotary: `(cos, sin)`, each `(video, head_dim)`, or `None` for absolute positions.
        text: how many tokens are text.
    """
    if rotary is None:
        return features
    turned = apply_rotary_emb(features[:, :, text:], rotary)
    return torch.cat([features[:, :, :text], turned], dim=2)


class ConceptAttention:
    """What `concept_attention` yields: the maps of the latest forward."""

    def __init__(self, token_mask: torch.Tensor, chunk_size: int) -> None:
        self._token_mask, self._chunk_size = token_mask, chunk_size
        self._rows = token_mask.any(dim=1).nonzero().flatten()
        self._total: torch.Tensor | None = None
        self._layers = 0
        self.running = False  # inside of a forward of the transformer

    @property
    def maps(self) -> torch.Tensor:
        """`(batch, video)` float32: mean over heads and layers; zero in rows without the concept."""
        if self._total is None:
            raise ValueError(
                "`maps` must be read after a forward of the transformer, got none yet."
            )
        return self._total / self._layers

    def begin(self, *_: Any) -> None:
        """Forget the forward before."""
        # A recomputation by gradient checkpointing runs blocks outside of a forward.
        self._total, self._layers, self.running = None, 0, True

    def end(self, *_: Any) -> None:
        """Hear nothing more until the next forward."""
        self.running = False

    def check_text(self, batch: int, text: int) -> None:
        """Refuse a forward of another batch or text length than that of `token_mask`."""
        if tuple(self._token_mask.shape) != (batch, text):
            raise ValueError(
                f"`token_mask` must be (batch, text tokens) = {(batch, text)}, got "
                f"{tuple(self._token_mask.shape)}. With guidance in one batch, give the rows of the "
                "negative prompt a mask of zeros."
            )

    @torch.no_grad()
    def add(self, query: torch.Tensor, key: torch.Tensor, rotary: Rotary | None) -> None:
        """Take one layer's normalised queries and keys `(batch, heads, text + video, head_dim)`."""
        rows = self._rows.to(query.device)
        token_mask = self._token_mask.to(query.device)
        text = token_mask.shape[1]
        maps = torch.zeros(query.shape[0], query.shape[2] - text, device=query.device)
        if len(rows):
            query, key = (rotate_video(part[rows], rotary, text) for part in (query, key))
            mass = attention_mass(query, key, token_mask[rows], chunk_size=self._chunk_size)
            maps[rows] = mass
        self._total = maps if self._total is None else self._total + maps.to(self._total.device)
        self._layers += 1


class _LayerReader:
    """Hooks of one joint attention: queries and keys right after their normalisation."""

    def __init__(self, name: str, attention: ConceptAttention) -> None:
        self.name, self.attention = name, attention
        self.rotary: Rotary | None = None
        self.query: torch.Tensor | None = None

    def begin(self, _: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.attention.running:
            return
        if kwargs.get("attention_mask") is not None:
            raise ValueError(f"`attention_mask` of `{self.name}` must be None, got a mask.")
        video, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        self.attention.check_text(len(video), text.shape[1])
        self.rotary = kwargs.get("image_rotary_emb")

    def read_query(self, _: torch.nn.Module, __: tuple, query: torch.Tensor) -> None:
        if self.attention.running:
            self.query = query.detach()

    def read_key(self, _: torch.nn.Module, __: tuple, key: torch.Tensor) -> None:
        # At once: the processor goes on to rotate both in place.
        if self.attention.running:
            self.attention.add(self.query, key.detach(), self.rotary)
            self.rotary = self.query = None


@contextmanager
def concept_attention(
    transformer: torch.nn.Module,
    token_mask: torch.Tensor,
    *,
    layers: Sequence[int] | None = None,
    chunk_size: int = 1024,
) -> Iterator[ConceptAttention]:
    """Read how strongly the video looks at a concept in every forward while the context is open.

    The model computes exactly what it computes without; hooks are removed on leaving, also after an
    exception. A backward pass with gradient checkpointing adds nothing.

    Args:
        transformer: a `CogVideoXTransformer3DModel`, plain or wrapped by PEFT.
        token_mask: `(batch, text)` bool, true at the concept's tokens; rows without any give zeros
            and cost nothing.
        layers: indices of transformer blocks; all when `None`.
        chunk_size: video queries at a time, see `attention_mass`.

    Yields:
        A `ConceptAttention`; after a forward its `maps` are `(batch, video)` float32, the mean over
        heads and layers of the attention mass on the concept's tokens.

    Raises:
        TypeError: `token_mask` is not bool.
        ValueError: `transformer` is not CogVideoX's, or `layers` or `chunk_size` are out of range.
    """
    if token_mask.dtype != torch.bool or token_mask.ndim != 2:
        raise TypeError(
            "`token_mask` must be (batch, text tokens) of bool, got "
            f"{tuple(token_mask.shape)} of {token_mask.dtype}."
        )
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    model = find_transformer(transformer)
    attention = ConceptAttention(token_mask, chunk_size)
    with ExitStack() as hooks:
        for name, module in find_joint_attentions(model, layers).items():
            reader = _LayerReader(name, attention)
            for handle in (
                module.register_forward_pre_hook(reader.begin, with_kwargs=True),
                module.norm_q.register_forward_hook(reader.read_query),
                module.norm_k.register_forward_hook(reader.read_key),
            ):
                hooks.callback(handle.remove)
        for handle in (
            model.register_forward_pre_hook(attention.begin),
            model.register_forward_hook(attention.end, always_call=True),
        ):
            hooks.callback(handle.remove)
        yield attention


def find_transformer(model: torch.nn.Module) -> CogVideoXTransformer3DModel:
    """The transformer itself, under whatever wraps it.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, CogVideoXTransformer3DModel):
            return module
    raise ValueError(
        f"`transformer` must be a CogVideoXTransformer3DModel, got a {type(model).__name__}."
    )


def find_joint_attentions(
    transformer: CogVideoXTransformer3DModel, layers: Sequence[int] | None = None
) -> dict[str, Attention]:
    """The `attn1` of CogVideoX blocks by name: all of them, or those of the chosen blocks.

    Raises:
        ValueError: `layers` names none, or blocks that are not there.
    """
    blocks = transformer.transformer_blocks
    chosen = range(len(blocks)) if layers is None else sorted(set(layers))
    if not chosen or min(chosen) < 0 or max(chosen) >= len(blocks):
        raise ValueError(f"`layers` must be from 0 to {len(blocks) - 1}, got {list(chosen)}.")
    return {f"transformer_blocks.{index}.attn1": blocks[index].attn1 for index in chosen}
