"""The models of a pipeline that feature statistics depend on, and facts to know them again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.core.pipeline_hand_over import plain_class


def denoiser_of(pipeline: Any) -> torch.nn.Module:
    """The pipeline's UNet or transformer."""
    for name in ("unet", "transformer"):
        if getattr(pipeline, name, None) is not None:
            return getattr(pipeline, name)
    raise ValueError(
        f"`pipeline` must have a UNet or a transformer, got {type(pipeline).__name__}."
    )


def model_fingerprints(pipeline: Any, names: Iterable[str]) -> dict[str, Any]:
    """Fingerprints of a pipeline's models; `"denoiser"` is its UNet or transformer.

    A model that the pipeline was loaded without is left out.

    Raises:
        ValueError: pipelines of this class have no such model.
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
