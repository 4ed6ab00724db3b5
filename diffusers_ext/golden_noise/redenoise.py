"""Golden noise as a target: a denoising step under strong guidance and back under weak guidance.

With the denoiser's output `o_w(x, t) = o_u + w (o_c - o_u)` at the first timestep t of the sampler,
and `x_p` one step below `x`, golden noise is

    x' = x - K [ o_w1(x, t) - o_w2(x_p, t) ],    w1 > w2

(Golden Noise for Diffusion Models, arXiv:2411.09502, section 3.1). `redenoise_coefficients.py` has K.
"""

from __future__ import annotations

import math

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.quiet_run import eval_mode
from diffusers_ext.families.registry import find_family
from diffusers_ext.families.text_conditioning import TextConditioning
from diffusers_ext.golden_noise.denoiser import TOOL, check_inputs, denoiser_of, guided_prediction
from diffusers_ext.golden_noise.noise_statistics import match_energy
from diffusers_ext.golden_noise.redenoise_coefficients import (
    RedenoiseCoefficients,
    diffusion_coefficients,
    flow_coefficients,
)


def step_coefficients(
    pipeline: DiffusionPipeline,
    size: tuple[int, int],
    *,
    num_steps: int = 10,
    legacy_inversion: bool = False,
) -> RedenoiseCoefficients:
    """What `redenoise` computes with: levels of the pipeline's scheduler, which is only read."""
    family = find_family(pipeline, TOOL)
    if not family.flow_matching:
        return diffusion_coefficients(pipeline.scheduler, num_steps, legacy_inversion)
    if legacy_inversion:
        raise ValueError(
            "`legacy_inversion` must be False for a flow-matching model, got True: it was never "
            "published for one."
        )
    patch = family.patch(denoiser_of(pipeline).config)
    tokens = (size[0] // patch) * (size[1] // patch)
    return flow_coefficients(pipeline.scheduler, num_steps, tokens, family)


def redenoise(
    pipeline: DiffusionPipeline,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None = None,
    *,
    num_steps: int = 10,
    w1: float = 5.5,
    w2: float = 1.0,
    legacy_inversion: bool = False,
    **text: torch.Tensor | None,
) -> torch.Tensor:
    """Noise that a denoising step under guidance `w1` and back under `w2` turns `latents` into.

    Args:
        pipeline: Stable Diffusion, SDXL, Hunyuan-DiT, SD3 or Flux; left as it is.
        latents: `(batch, channels, height, width)`, unit noise (before `init_noise_sigma`),
            unpacked also for Flux.
        prompt_embeds: `(batch, tokens, dim)`, one prompt a sample.
        negative_prompt_embeds: the same shape; needed where a guidance scale is not 1, unless the
            model takes it as an input.
        num_steps: steps of the sampler's grid whose first step is taken: the fewer, the stronger.
        w1: guidance scale of the step down.
        w2: guidance scale of the step up.
        legacy_inversion: the published form, whose step up begins one level too low.
        text: further fields of `TextConditioning`: `pooled_prompt_embeds` and
            `negative_pooled_prompt_embeds` (SDXL, SD3, Flux), masks and second embeddings.

    Returns:
        float32, the shape of `latents`. Its energy is a little off; `match_energy` brings it back.

    Raises:
        ValueError: inputs that do not fit the model, no negative embeddings where guidance needs
            them, a scheduler without the levels needed, or an impossible number of steps.
    """
    conditioning = TextConditioning(prompt_embeds, negative_prompt_embeds, **text)
    return redenoise_text(
        pipeline,
        latents,
        conditioning,
        num_steps=num_steps,
        w1=w1,
        w2=w2,
        legacy_inversion=legacy_inversion,
    )


@torch.no_grad()
def redenoise_text(
    pipeline: DiffusionPipeline,
    latents: torch.Tensor,
    text: TextConditioning,
    *,
    num_steps: int = 10,
    w1: float = 5.5,
    w2: float = 1.0,
    legacy_inversion: bool = False,
) -> torch.Tensor:
    """`redenoise` with the text in one object, as `encode_prompts` makes it."""
    for name, scale in (("w1", w1), ("w2", w2)):
        if not math.isfinite(scale):
            raise ValueError(f"`{name}` must be a finite number, got {scale}.")
    check_inputs(pipeline, latents, text, (w1, w2))
    size = (latents.shape[2], latents.shape[3])
    c = step_coefficients(pipeline, size, num_steps=num_steps, legacy_inversion=legacy_inversion)
    noise = latents.float()
    with eval_mode(pipeline):
        first = guided_prediction(pipeline, noise, c.timestep, text, w1)
        lower = c.down_noise * noise + c.down_first * first
        second = guided_prediction(pipeline, lower, c.timestep, text, w2)
    return c.noise * noise + (c.first * first + c.second * second)


def redenoise_sequence(
    pipeline: DiffusionPipeline,
    latents: torch.Tensor,
    text: TextConditioning,
    *,
    repeats: int,
    num_steps: int = 10,
    w1: float = 5.5,
    w2: float = 1.0,
    legacy_inversion: bool = False,
) -> torch.Tensor:
    """Re-denoise again and again, each time from the noise before, brought back to its energy.

    Args:
        repeats: how many times; two calls of the denoiser each.

    Returns:
        `(batch, repeats, channels, height, width)` float32, each with the energy of its `latents`.
    """
    if not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"`repeats` must be an integer of at least 1, got {repeats}.")
    source = noise = latents.float()
    states = []
    for _ in range(repeats):
        changed = redenoise_text(
            pipeline,
            noise,
            text,
            num_steps=num_steps,
            w1=w1,
            w2=w2,
            legacy_inversion=legacy_inversion,
        )
        noise = match_energy(changed, source)
        states.append(noise)
    return torch.stack(states, 1)
