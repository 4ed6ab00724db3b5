"""Find a model's transformer and its erasers, switch them off, and read what they add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from diffusers_ext.core.capture import natural_key
from diffusers_ext.core.restored_state import CallScope, module_eval_mode
from diffusers_ext.eraser.adapter.layer import EraserLayer, Recorder
from diffusers_ext.families import match_family

Reduce = Callable[[str, torch.Tensor], torch.Tensor]

# Under which PEFT, `torch.compile`, DDP and FSDP hold the model alone.
_WRAPPERS = ("base_model", "model", "module", "_orig_mod", "_fsdp_wrapped_module")


def unwrapped_transformer(model: Any) -> nn.Module | None:
    """The denoiser that an eraser is for, under whatever wraps it alone; `None` for any other model."""
    while isinstance(model, nn.Module) and match_family(model, "eraser_adapter") is None:
        children = dict(model.named_children())
        name = next(iter(children), "")
        model = children[name] if len(children) == 1 and name in _WRAPPERS else None
    return model if isinstance(model, nn.Module) else None


def eraser_layers(model: nn.Module) -> dict[str, EraserLayer]:
    """The layers with an eraser in natural order, `"transformer_blocks.0.attn1"` under whatever wraps the model."""
    layers = {
        _attention_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, EraserLayer) and module.eraser_down
    }
    return {name: layers[name] for name in sorted(layers, key=natural_key)}


@contextmanager
def erasers_disabled(*models: nn.Module) -> Iterator[None]:
    """Make models what they were before the erasers, for calls made inside of the context.

    Like `torch.no_grad` it is for the thread or task that opened it: a model that serves another request in another
    thread keeps its erasers. Contexts may overlap, and close in any order. LoRAs stay on, and nothing becomes
    trainable or frozen. After the last one each layer is as it was, also after an exception. A model without erasers
    is left alone. Compiled ones are not compiled again, and follow the thread, not the task.
    """
    with ExitStack() as stack:
        scope = stack.enter_context(CallScope())
        for layer in chain.from_iterable(eraser_layers(model).values() for model in models):
            stack.enter_context(layer.switched_off(scope))
        yield


@contextmanager
def eraser_scaled(model: nn.Module, adapter_name: str, scale: float) -> Iterator[None]:
    """Add `scale` to that of one eraser, for calls made inside of the context.

    It is for the thread or task that opened it, as `erasers_disabled` is: an eraser of scale 0 acts in one request
    and not in others of the same model.
    """
    with ExitStack() as stack:
        scope = stack.enter_context(CallScope())
        for layer in eraser_layers(model).values():
            if adapter_name in layer.scaling:
                stack.enter_context(layer.scaled_in(scope, adapter_name, scale))
        yield


@contextmanager
def frozen_teacher(*transformers: nn.Module) -> Iterator[None]:
    """Models without their erasers, in eval mode and without gradients; all of it comes back."""
    with torch.no_grad(), erasers_disabled(*transformers), module_eval_mode(*transformers):
        yield


@contextmanager
def eraser_outputs(
    model: nn.Module, adapter_name: str | None = None, reduce: Reduce | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Keep what the erasers add to the video tokens in the first forward pass of the context.

    It yields `{layer_name: output}`; an output is `(batch, video, dim)`, scale included. Later passes, the
    recomputation of gradient checkpointing and passes of other threads change nothing of it. Gradients flow through
    what is kept, also after the context is closed.

    Args:
        adapter_name: the eraser to read, which must be active to be seen; by default the sum of all that are active.
        reduce: keep `reduce(layer_name, output)` instead of the outputs, without keeping those; must be pure, for
            gradient checkpointing runs it again.
    """
    layers = _layers_with(model, adapter_name)
    outputs: dict[str, torch.Tensor] = {}
    stores = [outputs]
    scope = CallScope()

    def record(name: str, added: dict[str, torch.Tensor]) -> None:
        if adapter_name is None:
            output = sum(list(added.values())[1:], start=next(iter(added.values())))
        elif adapter_name in added:
            output = added[adapter_name]
        else:
            return
        # Recomputed too: gradient checkpointing counts the tensors that it saves.
        kept = output if reduce is None else reduce(name, output)
        if torch.compiler.is_compiling() or scope.covers_this_call():
            for store in stores:
                store.setdefault(name, kept)

    recorders = {name: partial(record, name) for name in layers}
    with scope, ExitStack() as stack:
        # A graph holds the recorders that it is recomputed with: they must not hold its tensors.
        stack.callback(stores.clear)
        if reduce is not None:
            stack.enter_context(_recompute_with(model, layers, recorders))
        stack.enter_context(_recording(layers, recorders))
        yield outputs


def trainable_eraser_parameters(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """The parameters of one eraser that an optimizer may train, in a fixed order; a frozen one is refused."""
    parameters = [
        parameter
        for layer in _layers_with(model, adapter_name).values()
        for projections in (layer.eraser_down, layer.eraser_up)
        if adapter_name in projections
        for parameter in projections[adapter_name].parameters()
        if parameter.requires_grad
    ]
    if not parameters:
        raise ValueError(
            f"`adapter_name` must name a trainable eraser, got {adapter_name!r}, which is frozen. "
            "Make it active with `set_adapter`, or load it with `is_trainable=True`."
        )
    return parameters


def _attention_name(name: str) -> str:
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts).removesuffix(".to_out.1")


def _layers_with(model: nn.Module, adapter_name: str | None) -> dict[str, EraserLayer]:
    layers = eraser_layers(model)
    known = sorted({name for layer in layers.values() for name in layer.eraser_down})
    if not layers or (adapter_name is not None and adapter_name not in known):
        wanted = "an eraser" if adapter_name is None else f"the eraser {adapter_name!r}"
        raise ValueError(f"`model` must have {wanted}, got {type(model).__name__} with {known or 'none'}.")
    return layers


@contextmanager
def _recording(layers: dict[str, EraserLayer], recorders: dict[str, Recorder]) -> Iterator[None]:
    try:
        for name, layer in layers.items():
            layer.recorders.append(recorders[name])
        yield
    finally:
        for name, layer in layers.items():
            layer.recorders.remove(recorders[name])


@contextmanager
def _recompute_with(
    model: nn.Module, layers: dict[str, EraserLayer], recorders: dict[str, Recorder]
) -> Iterator[None]:
    """Let blocks that are checkpointed now be recomputed with the recorders, whenever that is."""
    checkpointing = [module for module in model.modules() if "_gradient_checkpointing_func" in vars(module)]
    before = [module._gradient_checkpointing_func for module in checkpointing]

    def with_recorders(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        return lambda block, *args: checkpoint(_Recorded(block, layers, recorders), *args)

    try:
        for module, function in zip(checkpointing, before, strict=True):
            module._gradient_checkpointing_func = with_recorders(function)
        yield
    finally:
        for module, function in zip(checkpointing, before, strict=True):
            module._gradient_checkpointing_func = function


class _Recorded:
    """A block that runs with recorders on its layers, also after their context was closed."""

    def __init__(self, block: nn.Module, layers: dict[str, EraserLayer], recorders: dict[str, Recorder]) -> None:
        self.block, self.layers, self.recorders = block, layers, recorders

    def __call__(self, *args: Any) -> Any:
        missing = {name: layer for name, layer in self.layers.items() if self.recorders[name] not in layer.recorders}
        with _recording(missing, self.recorders):
            return self.block(*args)
