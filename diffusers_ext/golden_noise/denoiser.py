"""One guided prediction of a pipeline's denoiser, without running the pipeline."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.golden_noise.conditioning import TextConditioning
from diffusers_ext.golden_noise.denoiser_calls import DENOISER_CALLS
from diffusers_ext.golden_noise.families import has_embedded_guidance, pipeline_family


_REQUIRED: dict[str, tuple[str, ...]] = {
    "sd": (),
    "sdxl": ("pooled_prompt_embeds",),
    "hunyuan_dit": ("attention_mask", "prompt_embeds_2", "attention_mask_2"),
    "sd3": ("pooled_prompt_embeds",),
    "flux": ("pooled_prompt_embeds",),
}


def denoiser_of(pipeline: DiffusionPipeline) -> torch.nn.Module:
    """The pipeline's UNet or transformer."""
    return pipeline.unet if pipeline_family(pipeline) in ("sd", "sdxl") else pipeline.transformer


def latent_channels(pipeline: DiffusionPipeline) -> int:
    """Channels of the latents, unpacked also for Flux."""
    channels = int(denoiser_of(pipeline).config.in_channels)
    return channels // 4 if pipeline_family(pipeline) == "flux" else channels


def guided_prediction(
    pipeline: DiffusionPipeline,
    latents: torch.Tensor,
    timestep: torch.Tensor | float,
    text: TextConditioning,
    guidance_scale: float,
) -> torch.Tensor:
    """The denoiser's output under guidance, `o_u + w (o_c - o_u)`, in one call.

    Whether it is noise, `v` or a velocity is a matter of the pipeline's scheduler. Guidance is one
    call of doubled batch; `w = 1` needs no unconditional half; a denoiser that takes the guidance
    scale as an input gets `w` there.

    Args:
        pipeline: Stable Diffusion, SDXL, Hunyuan-DiT, SD3 or Flux.
        latents: `(batch, channels, height, width)`, as the denoiser takes them, unpacked also for
            Flux.
        timestep: on the scheduler's scale, usually 0 to 1000.
        text: the prompts, one a sample.
        guidance_scale: `w`.

    Returns:
        float32, the shape of `latents`; the denoiser itself runs in its own dtype.

    Raises:
        ValueError: latents or text that do not fit the denoiser, or no negative embeddings where
            `w` needs them.
    """
    check_inputs(pipeline, latents, text, (guidance_scale,))
    device = pipeline._execution_device
    inputs = latents.to(device, denoiser_of(pipeline).dtype)
    text = _cast(text.to(device), inputs.dtype)
    names = ("prompt_embeds", *_REQUIRED[pipeline_family(pipeline)])
    timestep = torch.as_tensor(timestep, device=device)
    forward = DENOISER_CALLS[pipeline_family(pipeline)]
    if guidance_scale == 1 or has_embedded_guidance(pipeline):
        output = forward(pipeline, inputs, timestep, text, guidance_scale)
        return output.float().to(latents.device)
    both = forward(
        pipeline, torch.cat([inputs] * 2), timestep, _doubled(text, names), guidance_scale
    )
    unconditional, conditional = both.float().chunk(2)
    output = unconditional + guidance_scale * (conditional - unconditional)
    return output.to(latents.device)


def check_inputs(
    pipeline: DiffusionPipeline,
    latents: torch.Tensor,
    text: TextConditioning,
    guidance_scales: tuple[float, ...],
) -> None:
    """Raise `ValueError` unless the denoiser can be called with these, also at these scales."""
    _check_latents(pipeline, latents)
    if len(text) != len(latents):
        raise ValueError(
            f"`prompt_embeds` must be a batch of {len(latents)} like `latents`, got "
            f"{tuple(text.prompt_embeds.shape)}."
        )
    for name, shape in _text_shapes(pipeline).items():
        tensor = getattr(text, name)
        if tensor is not None and not _fits(tensor, shape):
            wanted = ", ".join("any" if length is None else str(length) for length in shape)
            raise ValueError(
                f"`{name}` must be ({len(latents)}, {wanted}) for this "
                f"{type(pipeline).__name__}, got {tuple(tensor.shape)}."
            )
    names = _REQUIRED[pipeline_family(pipeline)]
    embedded = has_embedded_guidance(pipeline)
    if embedded and text.negative_prompt_embeds is not None:
        raise ValueError(
            "`negative_prompt_embeds` must be None for a model that takes the guidance scale as "
            "an input, got embeddings."
        )
    if not embedded and any(scale != 1 for scale in guidance_scales):
        names = names + tuple(f"negative_{name}" for name in ("prompt_embeds", *names))
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
    family = pipeline_family(pipeline)
    patch = 2 if family == "flux" else denoiser_of(pipeline).config.get("patch_size", 1)
    if latents.shape[2] % patch or latents.shape[3] % patch:
        raise ValueError(
            f"`latents` must have a height and width divisible by {patch}, got "
            f"{tuple(latents.shape)}."
        )


def _text_shapes(pipeline: DiffusionPipeline) -> dict[str, tuple[int | None, ...]]:
    """What follows the batch in the shapes of the text; `None` for any length."""
    family, denoiser = pipeline_family(pipeline), denoiser_of(pipeline)
    config = denoiser.config
    if family in ("sd3", "flux"):
        return {
            "prompt_embeds": (None, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }
    if family == "hunyuan_dit":
        return {
            "prompt_embeds": (config.text_len, config.cross_attention_dim),
            "prompt_embeds_2": (config.text_len_t5, config.cross_attention_dim_t5),
        }
    width = config.encoder_hid_dim or config.cross_attention_dim
    width = width[0] if isinstance(width, (list, tuple)) else width
    shapes: dict[str, tuple[int | None, ...]] = {"prompt_embeds": (None, width)}
    if family == "sdxl":
        sizes = 6 * config.addition_time_embed_dim
        shapes["pooled_prompt_embeds"] = (denoiser.add_embedding.linear_1.in_features - sizes,)
    return shapes


def _fits(tensor: torch.Tensor, shape: tuple[int | None, ...]) -> bool:
    found = tuple(tensor.shape[1:])
    return len(found) == len(shape) and all(
        wanted in (None, length) for wanted, length in zip(shape, found)
    )


def _cast(text: TextConditioning, dtype: torch.dtype) -> TextConditioning:
    tensors = text.tensors().items()
    return TextConditioning(**{k: x if "mask" in k else x.to(dtype) for k, x in tensors})


def _doubled(text: TextConditioning, names: tuple[str, ...]) -> TextConditioning:
    """The negative half, then the positive half, as one batch."""
    found = text.tensors()
    return TextConditioning(
        **{name: torch.cat([found[f"negative_{name}"], found[name]]) for name in names}
    )
