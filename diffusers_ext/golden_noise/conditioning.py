"""The text of prompts as the denoiser of a pipeline reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.restored_state import eval_mode
from diffusers_ext.families.registry import find_family
from diffusers_ext.families.text_conditioning import TextConditioning
from diffusers_ext.golden_noise.denoiser import TOOL


@torch.no_grad()
def encode_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], negative_prompt: str | None = None
) -> TextConditioning:
    """Encode prompts as the pipeline's own `__call__` does, with its default lengths.

    Args:
        pipeline: Stable Diffusion, SDXL, Hunyuan-DiT, SD3 or Flux.
        prompts: one a sample.
        negative_prompt: one for all; `None` is what the pipeline takes when none is given: the
            empty prompt, zeros for an SDXL pipeline with `force_zeros_for_empty_prompt`. A model
            that takes the guidance scale as an input has no negative embeddings.

    Returns:
        On the pipeline's device, in the dtype of its text encoders.

    Raises:
        ValueError: another family, no prompt, or a negative prompt for a model without one.
    """
    family = find_family(pipeline, TOOL)
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"`prompts` must be a non-empty list of strings, got {prompts!r}.")
    negatives = None if negative_prompt is None else [negative_prompt] * len(prompts)
    with eval_mode(pipeline):
        return family.encode(pipeline, list(prompts), negatives)
