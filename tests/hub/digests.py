"""Short digests that tell whether two things are the same to the bit."""

from __future__ import annotations

import hashlib

import torch
from diffusers import DiffusionPipeline

from diffusers_ext import FeatureStatistics

PROMPT = "a red seven"


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, types and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def pipeline_digest(pipeline: DiffusionPipeline) -> str:
    """Of the weights of all components, artifacts among them."""
    parts = {}
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            parts |= {f"{name}.{key}": value for key, value in component.state_dict().items()}
        elif isinstance(component, FeatureStatistics):
            tensors = component._to_artifact()[1]
            parts |= {f"{name}.{key}": value for key, value in tensors.items()}
    return digest(parts)


def picture(pipeline: DiffusionPipeline) -> str:
    """Digest of a picture in float32."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(PROMPT, num_inference_steps=2, generator=generator, output_type="pt", height=32, width=32).images
    return digest({"picture": images})


def module_digest(module: torch.nn.Module) -> str:
    """Of the class and the weights."""
    return f"{type(module).__name__} {digest(module.state_dict())}"


def shown_pipeline(pipeline: DiffusionPipeline) -> str:
    """Of the weights and a picture."""
    return f"{pipeline_digest(pipeline)} {picture(pipeline)}"
