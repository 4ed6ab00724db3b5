"""Wrap a model's attention processors for a while; those in place still compute the attention."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers.models.attention import AttentionMixin

from diffusers_ext.core.call_scopes import CallScope
from diffusers_ext.core.targets import match_names


_LOCK = threading.RLock()


class WrappingAttnProcessor:
    """Base of processors that leave the attention itself to the processor in place.

    An instance is a prototype for any number of layers: `use_processors` binds it to each of them.
    A subclass says in `around` what happens around the attention of one layer. It is a plain object
    without trained weights, and what is set on the prototype holds for all bound layers at once.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            f"{type(self).__name__} must be installed by `use_processors`, got a call of the "
            "prototype."
        )

    def check_layers(self, layers: Mapping[str, torch.nn.Module]) -> None:
        """Raise `ValueError` if the layers `{name: module}` do not suit; by default all do."""

    def around(
        self, name: str, attn: torch.nn.Module, hidden_states: Any, encoder_hidden_states: Any
    ) -> AbstractContextManager[Any]:
        """Context in which the processor in place computes the attention of the layer `name`."""
        raise TypeError(f"{type(self).__name__} must define `around`.")


class _BoundAttnProcessor:
    """One layer's processor while `use_processors` is open."""

    def __init__(
        self, prototype: WrappingAttnProcessor, name: str, inner: Any, scope: CallScope
    ) -> None:
        self.prototype, self.name, self.inner, self.scope = prototype, name, inner, scope


def _inner_attribute(name: str) -> property:
    def read(self: _BoundAttnProcessor) -> Any:
        return getattr(self.inner, name)

    def write(self: _BoundAttnProcessor, value: Any) -> None:
        setattr(self.inner, name, value)

    return property(read, write)


@functools.cache
def _bound_class(inner_class: type) -> type[_BoundAttnProcessor]:
    """The class of bound processors around processors of `inner_class`, with their signature."""
    signature = inspect.signature(inner_class.__call__)

    def __call__(self, attn, hidden_states, *args, **kwargs):
        if not torch.compiler.is_compiling() and not self.scope.covers_this_call():
            return self.inner(attn, hidden_states, *args, **kwargs)
        # Not every processor has `encoder_hidden_states` in the same place.
        given = signature.bind(self, attn, hidden_states, *args, **kwargs).arguments
        encoder = kwargs.get("encoder_hidden_states", given.get("encoder_hidden_states"))
        with self.prototype.around(self.name, attn, hidden_states, encoder):
            return self.inner(attn, hidden_states, *args, **kwargs)

    # Attention layers drop the arguments that the signature of their processor does not name.
    __call__.__signature__ = signature
    members = {
        "__call__": __call__,
        "_attention_backend": _inner_attribute("_attention_backend"),
        "_parallel_config": _inner_attribute("_parallel_config"),
    }
    return type(f"Wrapped{inner_class.__name__}", (_BoundAttnProcessor,), members)


@contextmanager
def use_processors(
    model: torch.nn.Module, processor: WrappingAttnProcessor, targets: str | Sequence[str] = "*"
) -> Iterator[list[str]]:
    """Bind a processor to attention layers of a diffusers model while the context is open.

    Each layer's own processor goes on computing the attention. On leaving, also after an exception,
    every layer of the model has the processor object back that it had on entering. Uses may be
    nested; those of several threads may overlap, and each acts on the calls of its own thread. A
    backward pass with gradient checkpointing belongs inside the context.

    Args:
        targets: glob pattern(s) on dotted names of attention layers, such as `"*attn2"`.

    Yields:
        The names of the bound layers, in natural order.

    Raises:
        TypeError: `model` or `processor` is of another kind.
        ValueError: a pattern matches no attention layer, a layer has fused projections, or the
            layers do not suit the processor.
    """
    if not isinstance(model, AttentionMixin):
        raise TypeError(
            "`model` must be a diffusers model with attention processors, got "
            f"{type(model).__name__}. Unwrap it first if it is wrapped."
        )
    if not isinstance(processor, WrappingAttnProcessor):
        raise TypeError(
            f"`processor` must be a WrappingAttnProcessor, got {type(processor).__name__}."
        )
    with CallScope() as scope:
        with _LOCK:
            originals = dict(model.attn_processors)
            bound = _bind(model, processor, targets, scope)
        try:
            with _LOCK:
                model.set_attn_processor({**originals, **bound})
            yield [key.removesuffix(".processor") for key in bound]
        finally:
            with _LOCK:
                now = model.attn_processors
                model.set_attn_processor({
                    key: _without(processor, scope, originals[key])
                    for key, processor in now.items()
                })  # fmt: skip


def _bind(
    model: AttentionMixin,
    processor: WrappingAttnProcessor,
    targets: str | Sequence[str],
    scope: CallScope,
) -> dict[str, _BoundAttnProcessor]:
    """`{name of a processor: bound processor}` of the chosen layers; nothing is installed."""
    processors = model.attn_processors
    names = [key.removesuffix(".processor") for key in processors]
    chosen = match_names(names, targets, f"attention layers of {type(model).__name__}")
    layers = {name: model.get_submodule(name) for name in chosen}
    for name, layer in layers.items():
        if getattr(layer, "fused_projections", False):
            raise ValueError(
                f"`{name}` must not have fused projections, got fused ones. Call "
                "`unfuse_qkv_projections()` first."
            )
    processor.check_layers(layers)
    bound = {}
    for key in (f"{name}.processor" for name in chosen):
        inner = processors[key]
        name = key.removesuffix(".processor")
        bound[key] = _bound_class(type(inner))(processor, name, inner, scope)
    return bound


def _without(now: Any, scope: CallScope, original: Any) -> Any:
    """A layer's processor without the wrapping of one use; those of other threads stay."""
    outer, processor = None, now
    while isinstance(processor, _BoundAttnProcessor):
        if processor.scope is scope:
            if outer is None:
                return processor.inner
            outer.inner = processor.inner
            return now
        outer, processor = processor, processor.inner
    innermost = original
    while isinstance(innermost, _BoundAttnProcessor):
        innermost = innermost.inner
    if processor is innermost:
        return now
    while isinstance(original, _BoundAttnProcessor) and not original.scope.is_open:
        original = original.inner
    return original
