"""Pipelines of diffusers and those with a component more: how they are made, handed over and known again.

diffusers reads the components of a pipeline from the signature of its constructor, its AutoPipelines look one up by
its class, and `from_pipe` leaves behind what a class does not take, without a word.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, get_type_hints

import torch
from diffusers.pipelines import auto_pipeline

from diffusers_ext.core.artifacts import fingerprint

logger = logging.getLogger(__name__)


def plain_class(pipeline_class: type) -> type:
    """The class of diffusers that a pipeline class is or extends; `ValueError` where there is none."""
    for parent in pipeline_class.__mro__:
        if parent.__module__.partition(".")[0] == "diffusers":
            return parent
    raise ValueError(f"`pipeline` must be one of diffusers, got {pipeline_class.__name__}.")


def add_component(pipeline_class: type, name: str, kind: Any) -> None:
    """Let the constructor take an optional component `name` of class `kind`, the last of them, for `set_<name>`.

    All else it takes is as in the pipeline of diffusers that `pipeline_class` extends, where optional components may
    be left out. `kind` may be a union: of all classes that `from_pipe` may hand over.
    """
    plain = plain_class(pipeline_class)
    pipeline_class._optional_components = [*plain._optional_components, name]
    components, _ = plain._get_signature_keys(plain)
    parameters = list(inspect.signature(plain.__init__).parameters.values())
    for index, known in reversed(list(enumerate(parameters))):
        if known.default is known.empty:
            if known.name not in plain._optional_components:
                break
            parameters[index] = known.replace(default=None)
    place = 1 + max(i for i, known in enumerate(parameters) if known.name in components)
    kind = kind | None
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters.insert(place, inspect.Parameter(name, either, default=None, annotation=kind))
    signature = inspect.Signature(parameters)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        component = given.arguments.pop(name, None)
        plain_args, plain_kwargs = given.args[1:], given.kwargs
        super(pipeline_class, self).__init__(*plain_args, **plain_kwargs)
        getattr(self, f"set_{name}")(component)

    __init__.__signature__ = signature
    # Where diffusers looks the classes of components up.
    __init__.__annotations__ = {**get_type_hints(plain.__init__), name: kind}
    pipeline_class.__init__ = __init__


def register_auto_pipeline(pipeline_class: type) -> None:
    """Let diffusers' AutoPipelines find a pipeline derived from one that they know; text-to-image gives itself."""
    text_to_image: MutableMapping[str, type] = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    plain = plain_class(pipeline_class)
    known = [name for name, found in text_to_image.items() if found is plain]
    if not known:
        return
    own = f"{known[0]}-{pipeline_class.__name__}"
    text_to_image[own] = pipeline_class
    for mapping in (auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING):
        if known[0] in mapping:
            mapping[own] = mapping[known[0]]


class HandOver:
    """Mixin, before the pipeline of diffusers: a warning where `from_pipe` leaves a component behind.

    `from_pipe` is a method of the class that is made, and of the pipeline it gets it reads `components`, here.
    """

    # component -> what to do without it
    _left_behind: Mapping[str, str] = {}

    @property
    def components(self) -> dict[str, Any]:
        """As in diffusers: the pipeline's components by name."""
        found = super().components
        caller = sys._getframe(1)
        if caller.f_code.co_name == "from_pipe" and "expected_modules" in caller.f_locals:
            self._warn_of_loss(found, frozenset(caller.f_locals["expected_modules"]))
        return found

    def _warn_of_loss(self, components: Mapping[str, Any], expected: frozenset[str]) -> None:
        said = vars(self).setdefault("_said_to_be_left_behind", set())
        for name, remedy in self._left_behind.items():
            if components.get(name) is None or name in expected or (name, expected) in said:
                continue
            said.add((name, expected))  # some versions read the components several times a call
            logger.warning(
                f"The pipeline that `from_pipe` makes of this {type(self).__name__} has no `{name}`: "
                f"its class takes none. {remedy}"
            )


def denoiser_of(pipeline: Any) -> torch.nn.Module:
    """The pipeline's UNet or transformer."""
    for name in ("unet", "transformer"):
        if getattr(pipeline, name, None) is not None:
            return getattr(pipeline, name)
    raise ValueError(f"`pipeline` must have a UNet or a transformer, got {type(pipeline).__name__}.")


def model_fingerprints(pipeline: Any, names: Iterable[str]) -> dict[str, Any]:
    """Fingerprints of a pipeline's models; `"denoiser"` is its UNet or transformer.

    A model that it was loaded without is left out; one that its class does not have is a `ValueError`.
    """
    found = {}
    for name in names:
        if name != "denoiser" and not hasattr(pipeline, name):
            raise ValueError(
                f"`statistics` must be of this pipeline's models, got some of a {name!r}, which "
                f"{type(pipeline).__name__} lacks."
            )
        model = denoiser_of(pipeline) if name == "denoiser" else getattr(pipeline, name)
        if model is not None:
            found[name] = fingerprint(model)
    return found


def plain_class_name(pipeline: Any) -> str:
    """Name of the class of diffusers that a pipeline is, or that its class extends."""
    return plain_class(type(pipeline)).__name__
