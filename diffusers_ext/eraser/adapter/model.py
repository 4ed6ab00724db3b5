"""The PEFT tuner that puts erasers beside joint attentions; importing it makes `ERASER` known to PEFT."""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from contextlib import ExitStack
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn

from diffusers_ext.core.capture import natural_key
from diffusers_ext.eraser.adapter.config import DEFAULT_LAYERS_PATTERN, PEFT_TYPE_NAME, EraserConfig, eraser_peft_type
from diffusers_ext.eraser.adapter.layer import EraserLayer, output_projection, refuse_merge
from diffusers_ext.families import Family, match_family, titles_of, transformers_of

_LEAF = ".to_out.1"
_METHOD = "save_pretrained"


class SaveGuard:
    """In the place of one model's `save_pretrained`, for as long as the model has an eraser.

    diffusers writes weights and reloads them into a plain model, so that an eraser would vanish: the pipeline's
    `save_pretrained` and `push_to_hub` ask each model for its own. Nothing of diffusers is changed but this one
    attribute of this one model, which is not kept alive; a copy of the model has a guard of its own.
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
                f"`save_pretrained` must not lose erasers, got a {type(model).__name__} with {names}, which a reload "
                f"would not have. Save each by `save_eraser(transformer, folder, adapter_name={names[0]!r})`, and "
                "load it by `load_eraser` onto the model it is for. To save the model without its erasers, call "
                "`transformer.delete_adapters(...)` or `pipe.unload_lora_weights()` first."
            )
        vars(model).pop(_METHOD, None)
        return getattr(model, _METHOD)(*args, **kwargs)


def guard_saving(model: nn.Module) -> None:
    """Refuse `save_pretrained` of a diffusers model until its erasers are gone."""
    from diffusers import ModelMixin  # slow, and not needed to tell PEFT of erasers

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


class EraserModel(BaseTuner):
    """Erasers beside the attentions of a denoiser that its family names, all by default, as a PEFT tuner.

    Each sits in the place of the dropout `...to_out.1`, a leaf without weights: the keys of the base model do not
    change, LoRAs match before and after, and unloading is exact. Usually made by `peft.get_peft_model` or
    `transformer.add_adapter`; the arguments are those of `BaseTuner`. The config is copied, and a failed injection
    leaves the model as it was.
    """

    prefix = "eraser_"
    tuner_layer_cls = EraserLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        if adapter_name in getattr(model, "peft_config", {}):
            raise ValueError(
                f"`adapter_name` must be new, got {adapter_name!r}, which the model has already. "
                "Delete it first, or choose another name."
            )
        with ExitStack() as undo, warnings.catch_warnings():
            # PEFT warns of a second adapter; several erasers, or LoRAs beside one, are meant to be.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            undo.callback(_forget_injection, model, adapter_name)
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
            undo.pop_all()

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add one eraser; see the class and `BaseTuner.inject_adapter`."""
        if "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            raise ValueError(
                "`adapter_name` must have no dot and not be an attribute of torch modules, got "
                f"{adapter_name!r}. Try {adapter_name.replace('.', '_') + '_eraser'!r}."
            )
        # A copy, for the facts of this model are written into it.
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        with ExitStack() as undo:
            undo.callback(_delete_eraser, model, adapter_name)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            undo.pop_all()
        guard_saving(model)

    def _prepare_adapter_config(self, peft_config: EraserConfig, model_config: dict[str, Any]) -> EraserConfig:
        complete_target(peft_config, self.model)
        if peft_config.base_model_name_or_path is None:
            # diffusers keeps the name in the config, where it may be a `Path`.
            path = model_config.get("_name_or_path")
            peft_config.base_model_name_or_path = str(path) if path else None
        return peft_config

    def _prepare_model(self, peft_config: EraserConfig, model: nn.Module) -> None:
        # All that can be refused is refused here, before the first layer is replaced.
        for family in filter(None, [match_family(model, "eraser_adapter")]):
            family.check_attachment(model.config)
        attentions = joint_attentions(model, peft_config)
        if not attentions:
            raise ValueError(
                f"`model` must be a denoiser of {titles_of('eraser_adapter')}, got {type(model).__name__}, which has "
                "no attention that an eraser goes beside."
            )
        for name, _ in model.named_modules():
            inside = name.rpartition(f"{_LEAF}.")[0] in attentions
            if name and not inside and self._check_target_module_exists(peft_config, name):
                _check_place(name, attentions)
        _check_layers(peft_config, len(attentions))
        _check_sizes(peft_config, attentions)

    def _create_and_replace(
        self,
        peft_config: EraserConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        _check_place(current_key, joint_attentions(self.model, peft_config))
        attention = self.model.get_submodule(current_key.removesuffix(_LEAF))
        layer = target
        if not isinstance(target, EraserLayer):
            inner = output_projection(attention).in_features
            family = match_family(self.model, "eraser_adapter")
            layer = EraserLayer(target, attention_width(attention), family is not None and family.video_alone, inner)
            layer.video_rows = None if family is None else family.video_rows
        device = _device_of(attention, current_key)
        layer.update_layer(adapter_name, peft_config.r, peft_config.init_weights, device, peft_config.kind)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        layer.watch_attention(attention)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
        if isinstance(child, EraserLayer):
            child.forget_attention()

    def _check_merge_allowed(self) -> None:
        refuse_merge(list(self.peft_config))


def attention_width(attention: nn.Module) -> int:
    """Width of the tokens that an attention puts out."""
    return output_projection(attention).out_features


def joint_attentions(model: nn.Module, config: EraserConfig | None = None) -> dict[str, nn.Module]:
    """The attentions that erasers, or those of a config, go beside, by name in natural order."""
    named = dict(model.named_modules())
    names = [name.removesuffix(_LEAF) for name in named if name.endswith(_LEAF)]
    families, found = _families_for(model, config), {}
    for name in sorted(names, key=natural_key):
        attention, block = named[name], named[name.rpartition(".")[0]]
        if any(family.is_joint_attention(attention, block) for family in families):
            found[name] = attention
    return found


def complete_target(config: EraserConfig, model: nn.Module) -> None:
    """Write into a config what it leaves to the model: all joint attentions, counted in the family's blocks."""
    attentions, (family, *_) = joint_attentions(model, config), _families_for(model, config)
    if config.layers_to_transform is not None and config.layers_pattern == DEFAULT_LAYERS_PATTERN:
        config.layers_pattern = family.blocks
    if config.target_modules is None:
        config.target_modules = {family.eraser_target}
        leaves = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{family.eraser_target}")]
        others = {name for name in leaves if name.removesuffix(_LEAF) not in attentions}
        if others and attentions and config.exclude_modules is None:
            config.exclude_modules = others


def _families_for(model: nn.Module, config: EraserConfig | None) -> list[Family]:
    family = match_family(model, "eraser_adapter")
    if family is None:  # others borrow attentions of transformers; a block of a UNet is everyone's
        return transformers_of("eraser_adapter")
    return [family.beside(None if config is None else config.target_modules)]


def _check_place(name: str, attentions: dict[str, nn.Module]) -> None:
    if not name.endswith(_LEAF) or name.removesuffix(_LEAF) not in attentions:
        raise ValueError(
            "`target_modules` must match the ends `...to_out.1` of joint attentions only, got a "
            f"match of {name!r}. Leave it out for all transformer blocks."
        )


def _device_of(attention: nn.Module, name: str) -> torch.device:
    projection = output_projection(attention)
    # torch's own quantised Linears give their weight by a call.
    weight = projection.weight() if callable(projection.weight) else projection.weight
    if weight.is_meta and hasattr(projection, "_hf_hook"):
        raise ValueError(
            f"`{name}` must not be offloaded to get an eraser, got sequential CPU offload. Add the "
            "eraser before `enable_sequential_cpu_offload()`."
        )
    return weight.device


def _check_layers(config: EraserConfig, count: int) -> None:
    layers = config.layers_to_transform
    layers = [layers] if isinstance(layers, int) else layers or []
    outside = [layer for layer in layers if not 0 <= layer < count]
    if outside:
        raise ValueError(f"`layers_to_transform` must lie between 0 and {count - 1}, got {outside}.")


def _check_sizes(config: EraserConfig, attentions: dict[str, nn.Module]) -> None:
    widths = [attention_width(attention) for attention in attentions.values()]
    narrowest, width = min(widths), max(widths)
    if config.r > narrowest:
        raise ValueError(f"`r` must be at most the width of the model, {narrowest}, got {config.r}.")
    eraser = (config.num_layers or len(attentions), config.in_features or width)
    if eraser != (len(attentions), width):
        raise ValueError(
            f"The eraser must fit the model, got one for {eraser[0]} layers of width {eraser[1]} and a model with "
            f"{len(attentions)} layers of width {width}. Load it into the model it was trained on."
        )
    config.num_layers, config.in_features = eraser


def _delete_eraser(model: nn.Module, adapter_name: str) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, EraserLayer) and adapter_name in layer.eraser_down:
            layer.delete_adapter(adapter_name)
            if not layer.eraser_down:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.base_layer)


def remove_eraser(model: nn.Module, adapter_name: str) -> None:
    """Take an eraser off a model; with the last adapter, PEFT's marks go as well."""
    _delete_eraser(model, adapter_name)
    model.peft_config.pop(adapter_name)
    if not model.peft_config:
        del model.peft_config
        model._hf_peft_config_loaded = False
    end_guard(weakref.ref(model))


def _forget_injection(model: nn.Module, adapter_name: str) -> None:
    getattr(model, "peft_config", {}).pop(adapter_name, None)
    # diffusers' `add_adapter` sets this before it adds anything, and then trusts it.
    if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
        model._hf_peft_config_loaded = False


def register_eraser() -> None:
    """Register `EraserConfig` and `EraserModel` with PEFT as `ERASER`; a second call does nothing."""
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(eraser_peft_type())
    if registered is None:
        register_peft_method(
            name=PEFT_TYPE_NAME.lower(), config_cls=EraserConfig, model_cls=EraserModel, prefix=EraserModel.prefix
        )
    elif registered.__module__ != EraserConfig.__module__:
        raise RuntimeError(
            f"The PEFT type {PEFT_TYPE_NAME} must be free, got {registered.__module__}."
            f"{registered.__qualname__} registered for it. Import only one of the two packages."
        )


register_eraser()
