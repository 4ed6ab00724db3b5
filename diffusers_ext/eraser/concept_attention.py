"""How strongly each video token looks at a concept's tokens, read while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb

from diffusers_ext.core.restored_state import CallScope
from diffusers_ext.eraser.adapter.outputs import unwrapped_transformer
from diffusers_ext.families import denoisers_of, find_family, match_family

Rotary = tuple[torch.Tensor, torch.Tensor]


def attention_mass(
    query: torch.Tensor, key: torch.Tensor, token_mask: torch.Tensor, *, chunk_size: int = 1024
) -> torch.Tensor:
    """Share of the video tokens' attention that lands on chosen text tokens, head by head.

    `sum over concept tokens j of softmax_j(q_i k_j^T / sqrt(head_dim))`, the softmax over all text and video keys: the
    output of the same attention with `value_j = 1` at the concept's tokens and 0 elsewhere, so that fused kernels
    compute it and no score matrix is kept.

    Queries and keys are `(batch, heads, text + video, head_dim)`, text first, after normalisation and rotary
    embedding; `token_mask` is `(batch, text)` bool, true at the concept's tokens; `chunk_size` video queries at a time
    bound the scores where no fused kernel serves. Returns `(batch, heads, video)` float32, from 0 to 1.
    """
    text = token_mask.shape[1]
    return text_shares(query[:, :, text:], key, token_mask, chunk_size=chunk_size)


def text_shares(
    query: torch.Tensor, key: torch.Tensor, token_mask: torch.Tensor, *, chunk_size: int = 1024
) -> torch.Tensor:
    """`attention_mass` of queries of the video alone, with keys that begin with the text, and may be the text alone.

    Of models with separate cross-attention the softmax is then over all text tokens, padding among them.
    """
    # As wide as the keys: flash kernels ask for one width.
    value = key.new_zeros(key.shape[0], 1, *key.shape[2:])
    value[:, 0, : token_mask.shape[1], 0] = token_mask.to(key)
    value = value.expand(-1, key.shape[1], -1, -1)
    chunks = query.split(chunk_size, dim=2)
    shares = [F.scaled_dot_product_attention(chunk, key, value)[..., 0].float() for chunk in chunks]
    return torch.cat(shares, dim=2)


def _rotate_video(features: torch.Tensor, rotary: Rotary | None, text: int) -> torch.Tensor:
    if rotary is None:
        return features
    # As CogVideoX does it, but not in place.
    turned = apply_rotary_emb(features[:, :, text:], rotary)
    return torch.cat([features[:, :, :text], turned], dim=2)


def standardize(maps: torch.Tensor) -> torch.Tensor:
    """Maps `(..., video)` with mean 0 and deviation 1 over their tokens; constant ones become 0."""
    centred = maps - maps.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()
    return torch.where(deviation > 0, centred / torch.where(deviation > 0, deviation, 1), 0)


def head_correlations(head_maps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of each head's map with a reference, over the tokens of each clip.

    From `(batch, layers, heads, video)` and `(batch, video)`, such as the difference that a concept makes to the
    velocity, to `(batch, layers, heads)` float32.
    """
    if head_maps.ndim != 4 or reference.shape != (len(head_maps), head_maps.shape[-1]):
        raise ValueError(
            "`reference` must be (batch, video) like `head_maps`, "
            f"{tuple(head_maps.shape)}, got {tuple(reference.shape)}."
        )
    pattern = standardize(reference.float())[:, None, None]
    return (standardize(head_maps.float()) * pattern).mean(dim=-1)


def agreement_weights(correlations: torch.Tensor) -> torch.Tensor:
    """How much each of `(layers, heads)` counts: its mean correlation, or 0 if negative; they add up to 1."""
    weights = correlations.mean(dim=0).clamp(min=0)
    if not (weights > 0).any():
        raise ValueError(
            "`correlations` must be above 0 for some head, got none. Where the anchor prompts are the "
            "prompts themselves, the concept changes nothing."
        )
    return weights / weights.sum()


class ConceptAttention:
    """What `concept_attention` yields: the `maps` of the latest forward."""

    def __init__(
        self, token_mask: torch.Tensor, chunk_size: int, head_weights: torch.Tensor | None, keep_heads: bool
    ) -> None:
        self._token_mask, self._chunk_size = token_mask, chunk_size
        self._head_weights, self._keep_heads = head_weights, keep_heads
        self._rows = token_mask.any(dim=1).nonzero().flatten()
        self._total: torch.Tensor | None = None
        self._heads: list[torch.Tensor] = []
        self._layers = 0
        self.scope = CallScope()  # outside of which, as in other threads, nothing is read
        self._in_forward = False

    @property
    def running(self) -> bool:
        """Inside of a forward of the transformer that is to be read."""
        return self._in_forward and self.scope.covers_this_call()

    @property
    def maps(self) -> torch.Tensor:
        """`(batch, video)` float32: the mean over heads and layers, or their weighted sum.

        Without weights it is a share from 0 to 1; weighted maps are standardised head by head. Zero in rows without
        the concept.
        """
        if self._total is None:
            raise ValueError("`maps` must be read after a forward of the transformer, got none yet.")
        return self._total if self._head_weights is not None else self._total / self._layers

    @property
    def head_maps(self) -> torch.Tensor:
        """`(batch, layers, heads, video)` float32, with `keep_heads`."""
        if not self._heads:
            raise ValueError("`head_maps` must be read after a forward with `keep_heads`, got none.")
        return torch.stack([mass.to(self._heads[0].device) for mass in self._heads], dim=1)

    def begin(self, *_: Any) -> None:
        """Forget the forward before; the hook at the start of one."""
        # A recomputation by gradient checkpointing runs blocks outside of a forward.
        if self.scope.covers_this_call():
            self._total, self._heads, self._layers, self._in_forward = None, [], 0, True

    def end(self, *_: Any) -> None:
        """Read nothing more until the next forward."""
        if self.scope.covers_this_call():
            self._in_forward = False

    def check_text(self, batch: int, text: int) -> None:
        """Refuse a forward of another batch or text length than that of `token_mask`."""
        if tuple(self._token_mask.shape) != (batch, text):
            raise ValueError(
                f"`token_mask` must be (batch, text tokens) = {(batch, text)}, got {tuple(self._token_mask.shape)}. "
                "With guidance in one batch, give the rows of the negative prompt a mask of zeros."
            )

    @torch.no_grad()
    def add(self, query: torch.Tensor, key: torch.Tensor, rotary: Rotary | None) -> None:
        """Take one layer's normalised queries and keys `(batch, heads, text + video, head_dim)`."""
        text, rows = self._token_mask.shape[1], self._rows.to(query.device)
        query, key = (_rotate_video(part[rows], rotary if len(rows) else None, text) for part in (query, key))
        self.add_text_keys(query[:, :, text:], key, rows)

    @torch.no_grad()
    def add_text_keys(self, query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Take one layer's normalised queries of the video alone, and keys that begin with the text.

        They are of all rows, or of those that name the concept, `rows`.
        """
        named, token_mask = self._rows.to(query.device), self._token_mask.to(query.device)
        if rows is None:
            query, key = query[named], key[named]
        mass = torch.zeros(len(token_mask), *query.shape[1:3], device=query.device)
        if len(named):
            mass[named] = text_shares(query, key, token_mask[named], chunk_size=self._chunk_size)
        if self._head_weights is None:
            maps = mass.mean(dim=1)
        else:
            weights = self._head_weights[self._layers].to(mass)
            maps = (standardize(mass) * weights[:, None]).sum(dim=1)
        if self._keep_heads:
            self._heads.append(mass)
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


class _TextKeyReader:
    """Hooks of one attention of the video to the text: queries and keys, all heads in one normalisation."""

    def __init__(self, name: str, attention: ConceptAttention) -> None:
        self.name, self.attention = name, attention
        self.heads, self.query = 1, None

    def begin(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.attention.running:
            return
        given = dict(zip(("hidden_states", "encoder_hidden_states", "attention_mask"), args)) | kwargs
        if given.get("attention_mask") is not None:
            raise ValueError(f"`attention_mask` of `{self.name}` must be None, got a mask.")
        self.attention.check_text(len(given["hidden_states"]), given["encoder_hidden_states"].shape[1])
        self.heads = module.heads

    def read_query(self, _: torch.nn.Module, __: tuple, query: torch.Tensor) -> None:
        if self.attention.running:
            self.query = query.detach()

    def read_key(self, _: torch.nn.Module, __: tuple, key: torch.Tensor) -> None:
        if self.attention.running:
            apart = (part.detach().unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, key))
            self.attention.add_text_keys(*apart)
            self.query = None


@contextmanager
def concept_attention(
    transformer: torch.nn.Module,
    token_mask: torch.Tensor,
    *,
    layers: Sequence[int] | None = None,
    head_weights: torch.Tensor | None = None,
    keep_heads: bool = False,
    chunk_size: int = 1024,
) -> Iterator[ConceptAttention]:
    """Read how strongly the video looks at a concept in every forward while the context is open.

    The model computes exactly what it computes without; hooks are removed on leaving, also after an exception. A
    backward pass with gradient checkpointing adds nothing, nor do other threads.

    Args:
        transformer: one that erasers are trained on, plain or wrapped by PEFT.
        token_mask: `(batch, text)` bool, true at the concept's tokens; rows without any give zeros and cost nothing.
        layers: indices of transformer blocks; all when `None`.
        head_weights: `(layers, heads)` of those layers, from `concept_head_weights`.
        keep_heads: keep all heads apart as well, in `head_maps`.
        chunk_size: see `attention_mass`.
    """
    if token_mask.dtype != torch.bool or token_mask.ndim != 2:
        raise TypeError(
            f"`token_mask` must be (batch, text tokens) of bool, got {tuple(token_mask.shape)} of {token_mask.dtype}."
        )
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    model = unwrapped_transformer(transformer)
    if model is None or match_family(model, "eraser") is None:
        raise ValueError(f"`transformer` must be a {denoisers_of('eraser')}, got a {type(transformer).__name__}.")
    kind = _LayerReader if find_family(model, "eraser").text_keys is None else _TextKeyReader
    modules = find_joint_attentions(model, layers)
    shape = (len(modules), model.config.num_attention_heads)
    if head_weights is not None and tuple(head_weights.shape) != shape:
        raise ValueError(f"`head_weights` must be (layers, heads) = {shape}, got {tuple(head_weights.shape)}.")
    attention = ConceptAttention(token_mask, chunk_size, head_weights, keep_heads)
    with attention.scope, ExitStack() as hooks:
        for name, module in modules.items():
            reader = kind(name, attention)
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


def find_joint_attentions(transformer: torch.nn.Module, layers: Sequence[int] | None = None) -> dict[str, Attention]:
    """The attentions in which video meets text by name: those of all blocks, or of the chosen ones."""
    family = find_family(transformer, "eraser")
    blocks, attention = getattr(transformer, family.blocks), family.text_keys or family.joint_attention
    chosen = range(len(blocks)) if layers is None else sorted(set(layers))
    if not chosen or min(chosen) < 0 or max(chosen) >= len(blocks):
        raise ValueError(f"`layers` must be from 0 to {len(blocks) - 1}, got {list(chosen)}.")
    return {f"{family.blocks}.{index}.{attention}": getattr(blocks[index], attention) for index in chosen}
