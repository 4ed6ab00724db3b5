"""Prompts as the denoiser of a pipeline reads them, and one guided prediction, without running it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.restored_state import eval_mode
from diffusers_ext.families.registry import find_family
from diffusers_ext.families.text_conditioning import TextConditioning

TOOL = "golden_noise"


def denoiser_of(pipeline: DiffusionPipeline) -> torch.nn.Module:
    """The pipeline's UNet or transformer."""
    return getattr(pipeline, find_family(pipeline, TOOL).denoiser)


def latent_channels(pipeline: DiffusionPipeline) -> int:
    """Channels of the latents, unpacked also for Flux."""
    return find_family(pipeline, TOOL).latent_channels(denoiser_of(pipeline).config)


def has_embedded_guidance(pipeline: DiffusionPipeline) -> bool:
    """Whether the denoiser takes the guidance scale as an input (Flux.1-dev, LCM)."""
    return find_family(pipeline, TOOL).embedded_guidance(denoiser_of(pipeline).config)


@torch.no_grad()
def encode_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], negative_prompt: str | None = None
) -> TextConditioning:
    """Encode prompts as the pipeline's own `__call__` does, with its default lengths.

    Args:
        pipeline: Stable Diffusion, SDXL, Hunyuan-DiT, SD3 or Flux.
        prompts: one a sample.
        negative_prompt: one for all; `None` is what the pipeline takes when none is given: the empty prompt, zeros for
            an SDXL pipeline with `force_zeros_for_empty_prompt`. A model that takes the guidance scale as an input has
            no negative embeddings.

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


def guided_prediction(
    pipeline: DiffusionPipeline,
    latents: torch.Tensor,
    timestep: torch.Tensor | float,
    text: TextConditioning,
    guidance_scale: float,
) -> torch.Tensor:
    """The denoiser's output under guidance, `o_u + w (o_c - o_u)`, in one call.

    Whether it is noise, `v` or a velocity is a matter of the pipeline's scheduler. Guidance is one call of doubled
    batch; `w = 1` needs no unconditional half; a denoiser that takes the guidance scale as an input gets `w` there.

    Args:
        pipeline: Stable Diffusion, SDXL, Hunyuan-DiT, SD3 or Flux.
        latents: `(batch, channels, height, width)`, as the denoiser takes them, unpacked also for Flux.
        timestep: on the scheduler's scale, usually 0 to 1000.
        text: the prompts, one a sample.
        guidance_scale: `w`.

    Returns:
        float32, the shape of `latents`; the denoiser itself runs in its own dtype.

    Raises:
        ValueError: latents or text that do not fit the denoiser, or no negative embeddings where `w` needs them.
    """
    check_inputs(pipeline, latents, text, (guidance_scale,))
    device = pipeline._execution_device
    inputs = latents.to(device, denoiser_of(pipeline).dtype)
    text = _cast(text.to(device), inputs.dtype)
    timestep = torch.as_tensor(timestep, device=device)
    family = find_family(pipeline, TOOL)
    if guidance_scale == 1 or has_embedded_guidance(pipeline):
        output = family.predict(pipeline, inputs, timestep, text, guidance_scale)
        return output.float().to(latents.device)
    text = _doubled(text, family.text_fields)
    both = family.predict(pipeline, torch.cat([inputs] * 2), timestep, text, guidance_scale)
    unconditional, conditional = both.float().chunk(2)
    output = unconditional + guidance_scale * (conditional - unconditional)
    return output.to(latents.device)


def check_inputs(
    pipeline: DiffusionPipeline, latents: torch.Tensor, text: TextConditioning, guidance_scales: tuple[float, ...]
) -> None:
    """Raise `ValueError` unless the denoiser can be called with these, also at these scales."""
    _check_latents(pipeline, latents)
    if len(text) != len(latents):
        raise ValueError(
            f"`prompt_embeds` must be a batch of {len(latents)} like `latents`, got {tuple(text.prompt_embeds.shape)}."
        )
    family = find_family(pipeline, TOOL)
    for name, shape in family.text_shapes(denoiser_of(pipeline).config).items():
        tensor = getattr(text, name)
        if tensor is not None and not _fits(tensor, shape):
            wanted = ", ".join("any" if length is None else str(length) for length in shape)
            raise ValueError(
                f"`{name}` must be ({len(latents)}, {wanted}) for this "
                f"{type(pipeline).__name__}, got {tuple(tensor.shape)}."
            )
    names = family.text_fields
    embedded = has_embedded_guidance(pipeline)
    if embedded and text.negative_prompt_embeds is not None:
        raise ValueError(
            "`negative_prompt_embeds` must be None for a model that takes the guidance scale as "
            "an input, got embeddings."
        )
    if not embedded and any(scale != 1 for scale in guidance_scales):
        names = names + tuple(f"negative_{name}" for name in names)
    missing = [name for name in names if getattr(text, name) is None]
    if missing:
        raise ValueError(
            f"`{missing[0]}` must be given to a {type(pipeline).__name__} at guidance scales "
            f"{guidance_scales}, got None. `encode_prompts` makes all that the model needs."
        )


def _check_latents(pipeline: DiffusionPipeline, latents: torch.Tensor) -> None:
    channels = latent_channels(pipeline)
    if latents.ndim != 4 or latents.shape[1] != channels or not latents.is_floating_point():
        raise ValueError(
            f"`latents` must be floating-point (batch, {channels}, height, width) for this "
            f"{type(pipeline).__name__}, got {latents.dtype} {tuple(latents.shape)}."
        )
    patch = find_family(pipeline, TOOL).patch(denoiser_of(pipeline).config)
    if latents.shape[2] % patch or latents.shape[3] % patch:
        raise ValueError(f"`latents` must have a height and width divisible by {patch}, got {tuple(latents.shape)}.")


def _fits(tensor: torch.Tensor, shape: tuple[int | None, ...]) -> bool:
    found = tuple(tensor.shape[1:])
    return len(found) == len(shape) and all(wanted in (None, length) for wanted, length in zip(shape, found))


def _cast(text: TextConditioning, dtype: torch.dtype) -> TextConditioning:
    tensors = text.tensors().items()
    return TextConditioning(**{k: x if "mask" in k else x.to(dtype) for k, x in tensors})


def _doubled(text: TextConditioning, names: tuple[str, ...]) -> TextConditioning:
    """The negative half, then the positive half, as one batch."""
    found = text.tensors()
    return TextConditioning(**{name: torch.cat([found[f"negative_{name}"], found[name]]) for name in names})
