"""Attention processors around those in place, which still compute: read what a layer reads, project its LoRAs."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.attention import AttentionMixin
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_ext.core.capture import Sink, first_tensor, match_names
from diffusers_ext.core.restored_state import CallScope

_LOCK = threading.RLock()
__all__ = ["CaptureAttnProcessor", "ProjectAttnProcessor", "use_processors"]


class WrappingAttnProcessor:
    """Base of processors that leave the attention itself to the processor in place.

    An instance is a prototype without trained weights: `use_processors` binds it to any number of layers, and what is
    set on it holds for all of them at once. A subclass says in `around` what happens around the attention of one
    layer.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} must be installed by `use_processors`, got a call of the prototype.")

    def check_layers(self, layers: Mapping[str, torch.nn.Module]) -> None:
        """Raise `ValueError` if the layers `{name: module}` do not suit; by default all do."""

    def around(
        self, name: str, attn: torch.nn.Module, hidden_states: Any, encoder_hidden_states: Any
    ) -> AbstractContextManager[Any]:
        """Context in which the processor in place computes the attention of the layer `name`."""
        raise TypeError(f"{type(self).__name__} must define `around`.")


class _BoundAttnProcessor:
    """One layer's processor while `use_processors` is open."""

    def __init__(self, prototype: WrappingAttnProcessor, name: str, inner: Any, scope: CallScope) -> None:
        self.prototype, self.name, self.inner, self.scope = prototype, name, inner, scope


def _inner_attribute(name: str) -> property:
    return property(lambda self: getattr(self.inner, name), lambda self, value: setattr(self.inner, name, value))


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
    """Bind a processor to the attention layers that glob patterns such as `"*attn2"` name; yields their names.

    Each layer's own processor goes on computing the attention, and is back on leaving, also after an exception. Uses
    may be nested; those of several threads may overlap, and each acts on the calls of its own thread. A backward pass
    with gradient checkpointing belongs inside the context. Fused projections are refused.
    """
    if not isinstance(model, AttentionMixin):
        raise TypeError(
            "`model` must be a diffusers model with attention processors, got "
            f"{type(model).__name__}. Unwrap it first if it is wrapped."
        )
    if not isinstance(processor, WrappingAttnProcessor):
        raise TypeError(f"`processor` must be a WrappingAttnProcessor, got {type(processor).__name__}.")
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
                model.set_attn_processor(
                    {key: _without(processor, scope, originals[key]) for key, processor in now.items()}
                )


def _bind(
    model: AttentionMixin, processor: WrappingAttnProcessor, targets: str | Sequence[str], scope: CallScope
) -> dict[str, _BoundAttnProcessor]:
    """`{name of a processor: bound processor}` of the chosen layers; nothing is installed."""
    processors = model.attn_processors
    names = [key.removesuffix(".processor") for key in processors]
    chosen = match_names(names, targets, f"attention layers of {type(model).__name__}")
    layers = {name: model.get_submodule(name) for name in chosen}
    for name, layer in layers.items():
        if getattr(layer, "fused_projections", False):
            raise ValueError(
                f"`{name}` must not have fused projections, got fused ones. Call `unfuse_qkv_projections()` first."
            )
    processor.check_layers(layers)
    inner = {name: processors[f"{name}.processor"] for name in chosen}
    return {f"{name}.processor": _bound_class(type(one))(processor, name, one, scope) for name, one in inner.items()}


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


class CaptureAttnProcessor(WrappingAttnProcessor):
    """Hands what attention layers read to `sink(name, features)`.

    `features`, usually `(batch, tokens, dim)`, are detached: `encoder_hidden_states` where the layer gets them, else
    `hidden_states`, as they enter the layer. For the exact input of a Linear, which may be normalised inside the
    layer, use `capture`.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink

    def around(
        self, name: str, attn: torch.nn.Module, hidden_states: Any, encoder_hidden_states: Any
    ) -> AbstractContextManager[Any]:
        """Call the sink, then leave the attention alone."""
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        self.sink(name, first_tensor(read))
        return nullcontext()


class ProjectAttnProcessor(WrappingAttnProcessor):
    """Takes from the loaded PEFT LoRAs, at run time, what acts on the preserved space.

    For every Linear that `projector` covers the branch of a LoRA sees `(1 - s) x + s x P` in place of `x`, so its
    update `B A` acts as `B A ((1 - s) I + s P)`. The weights stay as they are. Adapters may be loaded, switched and
    removed while the processor is in use; a fused LoRA, or one that is not plain, is refused then.

    Args:
        strength: `s` in [0, 1]; 0 is the LoRA as it is, to the bit. It may be set at any time, for all layers at once.
        projector: `{dotted name of a Linear: P}`, `P` symmetric `(in_features, in_features)`, the projection onto the
            directions that the preserved inputs do not use.
    """

    def __init__(self, strength: float = 1.0, *, projector: Mapping[str, torch.Tensor]) -> None:
        if not isinstance(projector, Mapping):
            raise TypeError(f"`projector` must map names of Linears to matrices, got a {type(projector).__name__}.")
        self.projections = dict(projector)
        for name, matrix in self.projections.items():
            if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
                raise ValueError(f"`projector[{name!r}]` must be a square matrix, got shape {tuple(matrix.shape)}.")
        self.strength = strength
        self._casts: dict[tuple[int, torch.dtype, torch.device], torch.Tensor] = {}

    @property
    def strength(self) -> float:
        """Share of the projection, in [0, 1]."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"`strength` must be in [0, 1], got {value}.")
        self._strength = float(value)

    def check_layers(self, layers: Mapping[str, torch.nn.Module]) -> None:
        """Raise `ValueError` if no Linear of the layers is covered, or one has another width."""
        covered = {name: module for layer, attn in layers.items() for name, module in self._covered(layer, attn)}
        if not covered:
            raise ValueError(
                "`projector` must cover a Linear of the chosen layers, got none of theirs: it covers "
                f"{next(iter(self.projections), None)!r}, a chosen layer is {next(iter(layers))!r}."
            )
        for name, module in covered.items():
            if self.projections[name].shape[0] != module.in_features:
                raise ValueError(
                    f"`projector[{name!r}]` must have width {module.in_features}, got shape "
                    f"{tuple(self.projections[name].shape)}."
                )

    @contextmanager
    def around(
        self, name: str, attn: torch.nn.Module, hidden_states: Any, encoder_hidden_states: Any
    ) -> Iterator[None]:
        """Hook the LoRA branches of the layer while its attention is computed."""
        with CallScope() as scope, ExitStack() as hooks:
            if self.strength != 0:
                for linear, module in self._covered(name, attn):
                    for lora_A in _lora_branches(linear, module):
                        hook = functools.partial(self._project, self.projections[linear], scope)
                        hooks.callback(lora_A.register_forward_pre_hook(hook).remove)
            yield

    def _covered(self, layer: str, attn: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
        for path, module in attn.named_modules(prefix=layer):
            if path in self.projections:
                yield path, module

    def _project(
        self, matrix: torch.Tensor, scope: CallScope, _: torch.nn.Module, args: tuple[torch.Tensor]
    ) -> torch.Tensor | None:
        if not torch.compiler.is_compiling() and not scope.covers_this_call():
            return None  # another thread is in this layer
        x = args[0]
        # The matrices are held by `projections`, so their ids stay theirs; Linears share matrices.
        key = (id(matrix), x.dtype, x.device)
        if key not in self._casts:
            self._casts[key] = matrix.detach().to(x)
        return (1 - self.strength) * x + self.strength * (x @ self._casts[key])


def _lora_branches(name: str, module: torch.nn.Module) -> list[torch.nn.Module]:
    """The `lora_A` of every adapter of a Linear; `ValueError` where hooks cannot project it."""
    if not isinstance(module, BaseTunerLayer):
        return []
    if not isinstance(module, LoraLayer):
        raise ValueError(f"`{name}` must carry LoRAs to be projected, got a {type(module)}.")
    if module.merged:
        raise ValueError(
            f"`{name}` must not have its LoRA fused to be projected, got {module.merged_adapters} "
            "fused into its weight. Call `unfuse_lora()` first."
        )
    for adapter in module.lora_A:
        if adapter in module.lora_variant or module.lora_B[adapter].bias is not None:
            raise ValueError(
                f"`{name}` must carry plain LoRAs to be projected, got {adapter!r}, which also "
                "changes what the projection cannot reach (DoRA, another variant, or a LoRA bias)."
            )
    return list(module.lora_A.values())
