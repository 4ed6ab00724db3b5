"""A base model as shapes: the classes and configs of its components, without any weights."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

from diffusers_ext.core.settings import did_you_mean
from diffusers_ext.core.text_files import read_json
from diffusers_ext.families.base_source import is_single_file
from diffusers_ext.families.registry import FAMILIES
from diffusers_ext.planning.tracing import tensor_bytes

DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Component:
    """One model of a pipeline: its class in diffusers or transformers, and what its config says.

    The class's own defaults fill in the rest.
    """

    class_name: str
    config: Mapping[str, Any]

    def build(self, dtype: torch.dtype = torch.float32, **changed: Any) -> torch.nn.Module:
        """The model on the meta device, frozen, in eval mode; `changed` are other values of its config."""
        model_class, config = _model_class(self.class_name), {**self.config, **changed}
        with torch.device("meta"):
            if issubclass(model_class, diffusers.ModelMixin):
                model = model_class.from_config(config)
            else:
                model = model_class(model_class.config_class(**config))
        # Not the method of diffusers, which has a warning about every cast.
        return torch.nn.Module.to(model, dtype).requires_grad_(False).eval()

    def whole_config(self) -> Any:
        """The config with all fields, those that the class fills in too; nothing is built."""
        model_class = _model_class(self.class_name)
        if not issubclass(model_class, diffusers.ModelMixin):
            return model_class.config_class(**self.config)
        parameters = inspect.signature(model_class.__init__).parameters.values()
        defaults = {one.name: one.default for one in parameters if one.name != "self"}
        return FrozenDict({**defaults, **self.config})

    def parameters(self) -> int:
        """How many."""
        return sum(parameter.numel() for parameter in self.build().parameters())

    def bytes(self, dtype: torch.dtype) -> int:
        """Of the weights and buffers in a dtype."""
        return module_bytes(self.build(dtype))


@dataclass(frozen=True)
class BaseModel:
    """The components of a pipeline that have weights.

    Attributes:
        name: as it is published, or the folder.
        pipeline: class name.
        components: by name, in the order of the pipeline.
        stored_dtype: of the published weights; `None` for a folder, which is there already.
    """

    name: str
    pipeline: str
    components: Mapping[str, Component]
    stored_dtype: torch.dtype | None = None

    @property
    def denoiser(self) -> str:
        """`"unet"` or `"transformer"`."""
        return next(name for name in DENOISERS if name in self.components)

    @property
    def text_encoders(self) -> list[str]:
        """Names of those that there are, in order."""
        return [name for name in self.components if name.startswith("text_encoder")]

    @property
    def download(self) -> int:
        """Bytes of the weights as they are published; 0 for a folder."""
        if self.stored_dtype is None:
            return 0
        sizes = (part.parameters() for part in self.components.values())
        return sum(sizes) * self.stored_dtype.itemsize

    def component(self, name: str) -> Component:
        """One of them; `ValueError` where there is none of that name."""
        if name not in self.components:
            raise ValueError(f"`model` must have a {name}, got {self.name} with {sorted(self.components)}.")
        return self.components[name]


def module_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return tensor_bytes([*module.parameters(), *module.buffers()])


def read_base_model(model: str | os.PathLike) -> BaseModel:
    """A published base model by its name, or a pipeline in a local folder.

    Nothing is fetched, and of a folder only configs are read.

    Args:
        model: such as `"SDXL"`, `"stabilityai/stable-diffusion-xl-base-1.0"` or `"CogVideoX-5b"`, or a folder.

    Raises:
        ValueError: neither, or a folder of a pipeline that is not known here.
    """
    if Path(model).is_dir():
        return read_folder(Path(model))
    if is_single_file(model):
        raise ValueError(
            f"`model` must be the folder of a pipeline or a published name, got {model}, a single file, "
            "which has no configs to plan by. Name the model that it is derived from, such as SDXL."
        )
    found = published_model(str(model))
    if found is None:
        raise ValueError(
            f"`model` must be the folder of a pipeline or one of {published_names()}, got "
            f"{str(model)!r}.{did_you_mean(str(model), published_names())} Download another model and name its folder."
        )
    return found


def read_folder(folder: Path) -> BaseModel:
    """The pipeline in a local folder, of which only configs are read.

    Raises:
        ValueError: no pipeline, or one without a denoiser.
    """
    index = _read_json(folder / "model_index.json")
    components = {}
    for name, entry in index.items():
        class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        path = folder / name / "config.json"
        # Tokenizers and schedulers have no weights, and no config of this name.
        if class_name is None or not path.is_file() or _model_class(class_name) is None:
            continue
        config = {key: value for key, value in _read_json(path).items() if key[0] != "_"}
        components[name] = Component(class_name, config)
    if not set(components) & set(DENOISERS):
        raise ValueError(
            f"`model` must have one of {DENOISERS} with a config.json, got {folder} with {sorted(components)}."
        )
    return BaseModel(str(folder), index.get("_class_name", ""), components)


def published_names() -> list[str]:
    """Short names of all that are known, in order."""
    return [model.short_name for family in FAMILIES for model in family.published]


def published_model(name: str) -> BaseModel | None:
    """The model of a short name or a name on the Hub, in any spelling; `None` for another."""
    wanted = _key(name.rpartition("/")[2])
    for family in FAMILIES:
        for model in family.published:
            if wanted in (_key(model.short_name), _key(model.repository.rpartition("/")[2])):
                parts = {part: Component(*of) for part, of in model.components.items()}
                return BaseModel(model.repository, family.pipelines[0], parts, model.dtype)
    return None


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"`model` must be the folder of a pipeline, got one without {path}.")
    return read_json(path)


def _model_class(name: str) -> type[torch.nn.Module] | None:
    if name == "StableDiffusionSafetyChecker":
        return StableDiffusionSafetyChecker
    for library in (diffusers, transformers):
        found = getattr(library, name, None)
        if isinstance(found, type) and issubclass(found, torch.nn.Module):
            return found
    return None
