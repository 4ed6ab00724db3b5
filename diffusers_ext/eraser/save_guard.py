"""`save_pretrained` of a transformer with erasers: it refuses to write a model without them."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from diffusers import ModelMixin
from torch import nn

from diffusers_ext.eraser.layer import EraserLayer


_METHOD = "save_pretrained"


class SaveGuard:
    """In the place of one model's `save_pretrained`, for as long as the model has an eraser.

    diffusers writes weights and reloads them into a plain model, so that an eraser would vanish: the
    pipeline's `save_pretrained` and `push_to_hub` ask each model for its own. Nothing of diffusers
    is changed but this one attribute of this one model, which is not kept alive; a copy of the model
    has a guard of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __reduce__(self) -> tuple[type[SaveGuard], tuple[nn.Module]]:
        return type(self), (self._model(),)

    @property
    def __signature__(self) -> inspect.Signature:
        # The pipeline passes on what the signature names.
        return inspect.signature(getattr(type(self._model()), _METHOD).__get__(self._model()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        names = eraser_names(model)
        if names:
            raise ValueError(
                "`save_pretrained` must not lose erasers, got a "
                f"{type(model).__name__} with {names}, which "
                "a reload would not have. Save each by `save_eraser(transformer, folder, "
                f"adapter_name={names[0]!r})`, and load it by `load_eraser` onto the model it is for. "
                "To save the model without its erasers, call `transformer.delete_adapters(...)` or "
                "`pipe.unload_lora_weights()` first."
            )
        vars(model).pop(_METHOD, None)
        return getattr(model, _METHOD)(*args, **kwargs)


def guard_saving(model: nn.Module) -> None:
    """Refuse `save_pretrained` of a diffusers model until its erasers are gone."""
    if not isinstance(model, ModelMixin):
        return
    vars(model).setdefault(_METHOD, SaveGuard(model))
    reference = weakref.ref(model)
    for part in model.modules():
        if isinstance(part, EraserLayer):
            # diffusers' `unload_lora` drops layers without a word to anyone.
            weakref.finalize(part, end_guard, reference).atexit = False


def end_guard(reference: weakref.ref) -> None:
    """Give a model its own `save_pretrained` back where it has no eraser any more."""
    model = reference()
    if model is not None and not eraser_names(model):
        if isinstance(vars(model).get(_METHOD), SaveGuard):
            del vars(model)[_METHOD]


def eraser_names(model: nn.Module) -> list[str]:
    """The names of all erasers of a model, active or not."""
    layers = [part for part in model.modules() if isinstance(part, EraserLayer)]
    return list(dict.fromkeys(name for layer in layers for name in layer.eraser_down))
