"""The picture that a model expects of noise: what one call of its denoiser at the first step says of a seed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.restored_state import module_eval_mode
from diffusers_ext.families import find_family
from diffusers_ext.families.family import Family, TextConditioning
from diffusers_ext.families.predictions import predicted_x_0
from diffusers_ext.golden_noise.diversity import without_spreading
from diffusers_ext.golden_noise.redenoise import TOOL, first_ddim_step, flow_coefficients

_TOLD_GUIDANCE = 3.5  # where the denoiser takes the scale as an input: the one these models are drawn with

# Of unit noise and the number of denoising steps: clean latents, both `(batch, channels, height, width)`.
Predict = Callable[[torch.Tensor, int], torch.Tensor]


def first_prediction(pipeline: DiffusionPipeline, text: TextConditioning) -> Predict:
    """What `refine` takes as `predict`, for a pipeline of a family of golden noise and a text a noise."""
    return partial(predict_picture, pipeline, find_family(pipeline, TOOL), text)


@torch.no_grad()
def predict_picture(
    pipeline: Any, family: Family, text: TextConditioning, noise: torch.Tensor, num_steps: int
) -> torch.Tensor:
    """The clean latents, float32, that one call of the denoiser, without guidance, expects of unit `noise`.

    Args:
        pipeline: with denoiser and scheduler, which are left as they are.
        text: one prompt a noise; its negative half is not read.
        noise: `(batch, channels, height, width)`, unpacked also for Flux.
        num_steps: of the sampler's grid, whose first timestep is asked for.
    """
    denoiser, device = getattr(pipeline, family.denoiser), pipeline._execution_device
    missing = [name for name in family.text_fields if getattr(text, name) is None and "mask" not in name]
    if missing:
        raise ValueError(
            f"`{missing[0]}` must be given to the denoiser of {family.title}, got None in `text`. Make the noise by "
            "`refine(..., predict=first_prediction(pipeline, encode_prompts(pipeline, prompts)))` and pass it as "
            "`latents`, or train a guard that reads the noise alone."
        )
    timestep = _first_timestep(pipeline.scheduler, family, denoiser.config, noise.shape[-2:], num_steps)
    scale = _TOLD_GUIDANCE if family.embedded_guidance(denoiser.config) else 1.0
    with without_spreading(), module_eval_mode(denoiser):
        output = family.predict(
            pipeline, noise.to(device, denoiser.dtype), torch.as_tensor(timestep, device=device),
            text.to(device, denoiser.dtype), scale,
        )  # fmt: skip
    output, noise = output.float().to(noise.device), noise.float()
    times = torch.full((len(noise),), timestep, device=noise.device)
    level = family.level(pipeline.scheduler, times, noise)
    return predicted_x_0(output, noise, level, family.prediction_type(pipeline.scheduler))


def _first_timestep(scheduler: Any, family: Family, config: Any, size: torch.Size, num_steps: int) -> float:
    if not family.flow_matching:
        return first_ddim_step(scheduler.config, num_steps)[0]
    patch = family.patch(config)
    return flow_coefficients(scheduler, num_steps, (size[0] // patch) * (size[1] // patch), family).timestep
