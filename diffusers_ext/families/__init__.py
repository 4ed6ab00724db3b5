"""Base-model families: one file each says all that the tools must know of it; here, which one a model belongs to."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

from diffusers_ext.families.auraflow import AuraFlow
from diffusers_ext.families.chroma import Chroma
from diffusers_ext.families.cogvideox import CogVideoX
from diffusers_ext.families.family import Family, import_class
from diffusers_ext.families.flux import Flux
from diffusers_ext.families.flux2 import Flux2, Flux2Dev
from diffusers_ext.families.hunyuan_dit import HunyuanDiT
from diffusers_ext.families.hunyuan_video import HunyuanVideo
from diffusers_ext.families.hunyuan_video15 import HunyuanVideo15
from diffusers_ext.families.ltx2 import LTX2
from diffusers_ext.families.qwen_image import QwenImage
from diffusers_ext.families.sd3 import SD3
from diffusers_ext.families.sdxl import SDXL
from diffusers_ext.families.stable_diffusion import StableDiffusion
from diffusers_ext.families.wan import Wan
from diffusers_ext.families.z_image import ZImage

__all__ = ["FAMILIES", "Family", "find_family", "find_modular_family", "match_family"]

FAMILIES: list[Family] = [
    StableDiffusion(),
    SDXL(),
    HunyuanDiT(),
    SD3(),
    Flux(),
    Flux2(),
    Flux2Dev(),
    Chroma(),
    AuraFlow(),
    QwenImage(),
    ZImage(),
    Wan(),
    LTX2(),
    HunyuanVideo(),
    HunyuanVideo15(),
    CogVideoX(),
]


def families_of(tool: str | None) -> list[Family]:
    """Those that a tool works with; all when `None`, and all that say where erasers attach for `"eraser_adapter"`.

    A trained eraser is loaded, dialled and saved by more families than one can be trained on, which come first.
    """
    if tool == "eraser_adapter":
        attached = [family for family in FAMILIES if family.joint_attention is not None]
        return sorted(attached, key=lambda family: "eraser" not in family.tools)
    return [family for family in FAMILIES if tool is None or tool in family.tools]


def transformers_of(tool: str | None) -> list[Family]:
    """Those of `families_of` whose denoiser is a transformer."""
    return [family for family in families_of(tool) if family.denoiser == "transformer"]


def denoisers_of(tool: str) -> str:
    """Names of the denoiser classes that a tool works with, for an error."""
    return " or ".join(dict.fromkeys(_bare(f.denoiser_class) for f in families_of(tool)))


def titles_of(tool: str) -> str:
    """Names of the families that a tool works with, for an error."""
    return " or ".join(family.title for family in families_of(tool))


def match_family(model: Any, tool: str | None = None) -> Family | None:
    """The family of a pipeline or a denoiser, or of a class or class name; `None` for another.

    Of several, that of the nearest base class; models of one class that families share get the first.

    Args:
        model: object, class or name.
        tool: consider only families that this tool works with.

    Raises:
        ValueError: the tool works with the family, but not under the installed diffusers.
    """
    family = _match(model, tool)
    if family is not None and tool is not None:
        check_diffusers(family)
    return family


def _match(model: Any, tool: str | None) -> Family | None:
    if isinstance(model, str):
        return next((f for f in families_of(tool) if model in map(_bare, _names(f))), None)
    kind = model if isinstance(model, type) else type(model)
    for parent in kind.__mro__:
        for family in families_of(tool):
            for name in _names(family):
                # By the name first: a class that exists has been imported already.
                if _bare(name) == parent.__name__ and import_class(name) is parent:
                    return family
    return None


def check_diffusers(family: Family) -> None:
    """Raise `ValueError` where a family needs a newer diffusers than is installed."""
    needed = family.needs_diffusers
    if needed is None:
        return
    installed = version("diffusers")  # which reads a file
    if _numbers(installed) < _numbers(needed):
        raise ValueError(
            f"`diffusers` must be {needed} or newer for {family.title}, got {installed}. "
            f"Run: pip install -U 'diffusers>={needed}'."
        )


def find_family(pipeline: Any, tool: str | None = None) -> Family:
    """As `match_family`; `ValueError` for a pipeline of another family."""
    family = match_family(pipeline, tool)
    if family is None:
        supported = ", ".join(_bare(name) for f in families_of(tool) for name in f.pipelines[:1])
        found = pipeline if isinstance(pipeline, str) else _kind(pipeline)
        raise ValueError(f"`pipeline` must be one of {supported} or derived from one, got a {found}.")
    return family


def find_modular_family(pipeline: Any) -> Family:
    """The family of a modular pipeline of diffusers; `ValueError` for another."""
    name = getattr(pipeline, "default_blocks_name", None)
    for family in FAMILIES:
        if name in family.modular_blocks:
            return family
    known = [name for family in FAMILIES for name in family.modular_blocks]
    raise ValueError(f"`pipeline` must be a modular pipeline with blocks of one of {known}, got {name}.")


def _numbers(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)[:2]]


def _names(family: Family) -> list[str]:
    return [*family.pipelines, family.denoiser_class]


def _bare(name: str) -> str:
    return name.rpartition(":")[2]


def _kind(model: Any) -> str:
    return (model if isinstance(model, type) else type(model)).__name__
