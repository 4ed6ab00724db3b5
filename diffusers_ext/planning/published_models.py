"""Base models to plan for, by a published name or from a local folder."""

from __future__ import annotations

import os
from pathlib import Path

from diffusers_ext.core.keywords import did_you_mean
from diffusers_ext.families.base_source import is_single_file
from diffusers_ext.families.registry import FAMILIES
from diffusers_ext.planning.base_model import BaseModel, Component, read_folder


def read_base_model(model: str | os.PathLike) -> BaseModel:
    """A published base model by its name, or a pipeline in a local folder.

    Nothing is fetched, and of a folder only configs are read.

    Args:
        model: such as `"SDXL"`, `"stabilityai/stable-diffusion-xl-base-1.0"` or `"CogVideoX-5b"`, or
            a folder.

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
