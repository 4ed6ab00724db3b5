"""Golden noise as a target: a denoising step under strong guidance and back under weak guidance.

With the denoiser's output `o_w(x, t) = o_u + w (o_c - o_u)` at the first timestep t of the sampler, and `x_p` one step
below `x`, golden noise is

    x' = x - K [ o_w1(x, t) - o_w2(x_p, t) ],    w1 > w2

(Golden Noise for Diffusion Models, arXiv:2411.09502, section 3.1); `RedenoiseCoefficients` has K.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.restored_state import eval_mode
from diffusers_ext.core.seeds import check_diffusion_levels, check_prediction_type
from diffusers_ext.families import find_family
from diffusers_ext.families.family import Family, TextConditioning
from diffusers_ext.families.predictions import Level, diffusion_level, step_factors
from diffusers_ext.golden_noise.noise_statistics import match_energy

TOOL = "golden_noise"


@torch.no_grad()
def encode_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], negative_prompt: str | None = None
) -> TextConditioning:
    """Encode prompts as the pipeline's own `__call__` does, with its default lengths, on its device.

    Args:
        pipeline: of a family of golden noise.
        prompts: one a sample.
        negative_prompt: one for all; `None` is what the pipeline takes when none is given: the empty prompt, zeros for
            an SDXL pipeline with `force_zeros_for_empty_prompt`. A model that takes the guidance scale as an input has
            no negative embeddings.
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
        latents: `(batch, channels, height, width)`, as the denoiser takes them, unpacked also for Flux.
        timestep: on the scheduler's scale, usually 0 to 1000.
        guidance_scale: `w`.

    Returns:
        float32, the shape of `latents`; the denoiser itself runs in its own dtype.
    """
    check_inputs(pipeline, latents, text, (guidance_scale,))
    family, denoiser = find_family(pipeline, TOOL), denoiser_of(pipeline)
    device, dtype = pipeline._execution_device, denoiser.dtype
    inputs, timestep = latents.to(device, dtype), torch.as_tensor(timestep, device=device)
    text = text.to(device, dtype)
    if guidance_scale == 1 or family.embedded_guidance(denoiser.config):
        output = family.predict(pipeline, inputs, timestep, text, guidance_scale)
        return output.float().to(latents.device)
    # The negative half, then the positive half, as one batch.
    found = text.tensors()
    read = [name for name in family.text_fields if name in found]
    text = TextConditioning(**{name: torch.cat([found[f"negative_{name}"], found[name]]) for name in read})
    both = family.predict(pipeline, torch.cat([inputs] * 2), timestep, text, guidance_scale)
    unconditional, conditional = both.float().chunk(2)
    output = unconditional + guidance_scale * (conditional - unconditional)
    return output.to(latents.device)


def check_inputs(
    pipeline: DiffusionPipeline, latents: torch.Tensor, text: TextConditioning, guidance_scales: tuple[float, ...]
) -> None:
    """Raise `ValueError` unless the denoiser can be called with these, also at these scales."""
    family, kind = find_family(pipeline, TOOL), type(pipeline).__name__
    config = denoiser_of(pipeline).config
    channels, patch = family.latent_channels(config), family.patch(config)
    if latents.ndim != 4 or latents.shape[1] != channels or not latents.is_floating_point():
        raise ValueError(
            f"`latents` must be floating-point (batch, {channels}, height, width) for this {kind}, got "
            f"{latents.dtype} {tuple(latents.shape)}."
        )
    if latents.shape[2] % patch or latents.shape[3] % patch:
        raise ValueError(f"`latents` must have a height and width divisible by {patch}, got {tuple(latents.shape)}.")
    if len(text) != len(latents):
        raise ValueError(
            f"`prompt_embeds` must be a batch of {len(latents)} like `latents`, got {tuple(text.prompt_embeds.shape)}."
        )
    for name, shape in family.text_shapes(config).items():
        tensor = getattr(text, name)
        if tensor is not None and not _fits(tensor, shape):
            wanted = ", ".join("any" if length is None else str(length) for length in shape)
            raise ValueError(
                f"`{name}` must be ({len(latents)}, {wanted}) for this {kind}, got {tuple(tensor.shape)}."
            )
    # A text that is as long as its prompt needs no mask alone.
    names = tuple(name for name in family.text_fields if family.pads_text or "mask" not in name)
    embedded = family.embedded_guidance(config)
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
            f"`{missing[0]}` must be given to a {kind} at guidance scales "
            f"{guidance_scales}, got None. `encode_prompts` makes all that the model needs."
        )


def _fits(tensor: torch.Tensor, shape: tuple[int | None, ...]) -> bool:
    found = tuple(tensor.shape[1:])
    return len(found) == len(shape) and all(wanted in (None, length) for wanted, length in zip(shape, found))


class RedenoiseCoefficients(NamedTuple):
    """`x_p = down_noise x + down_first o_1`, `x' = noise x + first o_1 + second o_2`."""

    timestep: float  # where the denoiser is asked both times
    down_noise: float
    down_first: float
    noise: float
    first: float
    second: float


def first_ddim_step(config: Any, num_steps: int) -> tuple[int, int]:
    """First timestep of the grid of a scheduler's `config`, and the one that its DDIM step goes to."""
    grid = DDIMScheduler.from_config(config)
    total = grid.config.num_train_timesteps
    _check_num_steps(num_steps, total)
    grid.set_timesteps(num_steps)
    # With an offset a grid of all timesteps would begin one beyond the last.
    first = min(int(grid.timesteps[0]), total - 1)
    return first, first - total // num_steps


def diffusion_coefficients(scheduler: Any, num_steps: int, legacy_inversion: bool = False) -> RedenoiseCoefficients:
    """Coefficients for a model of noise or `v`, from its scheduler's levels; float64.

    `legacy_inversion` is the step up as published, with a level that is one too low: `x_p` counts as of level `p - (t
    - p)` and is brought to level p, by `DDIMInverseScheduler`'s formula.
    """
    check_diffusion_levels(scheduler, "pipeline.scheduler")
    check_prediction_type(scheduler)
    kind = scheduler.config.prediction_type
    start, end = first_ddim_step(scheduler.config, num_steps)
    sample, output = step_factors(_level(scheduler, start), _level(scheduler, end), kind)
    if not legacy_inversion:
        return _solved(start, sample, output)
    below = 2 * end - start
    if below < 0:
        raise ValueError(f"`num_steps` must leave a level below the step's for `legacy_inversion`, got {num_steps}.")
    up = step_factors(_level(scheduler, below), _level(scheduler, end), kind)
    return RedenoiseCoefficients(start, sample, output, up[0] * sample, up[0] * output, up[1])


def _level(scheduler: Any, timestep: int) -> Level:
    return diffusion_level(scheduler.alphas_cumprod[timestep].double().item())


def flow_coefficients(
    scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, image_tokens: int, family: Family
) -> RedenoiseCoefficients:
    """Coefficients for a model of velocity, from the first two levels of the pipeline's grid.

    A dynamic shift of the grid depends on `image_tokens`, the number in one image.
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            "`pipeline.scheduler` must be a FlowMatchEulerDiscreteScheduler, got a "
            f"{type(scheduler).__name__}. Put one of the model's configuration there."
        )
    _check_num_steps(num_steps, scheduler.config.num_train_timesteps)
    grid = copy.copy(scheduler)  # which gets new levels, and leaves those of the scheduler as they are
    grid.set_timesteps(num_steps, **family.grid_arguments(scheduler.config, num_steps, image_tokens))
    start, end = grid.sigmas[:2].double().tolist()
    levels = (Level(1 - sigma, sigma) for sigma in (start, end))
    return _solved(grid.timesteps[0].item(), *step_factors(*levels, "flow_prediction"))


def _solved(timestep: float, sample: float, output: float) -> RedenoiseCoefficients:
    """The step `sample x + output o`, solved for `x`."""
    return RedenoiseCoefficients(timestep, sample, output, 1.0, output / sample, -output / sample)


def _check_num_steps(num_steps: int, total: int) -> None:
    if not isinstance(num_steps, int) or not 2 <= num_steps <= total:
        raise ValueError(f"`num_steps` must be an integer from 2 to {total}, got {num_steps}.")


def step_coefficients(
    pipeline: DiffusionPipeline, size: tuple[int, int], *, num_steps: int = 10, legacy_inversion: bool = False
) -> RedenoiseCoefficients:
    """What `redenoise` computes with: levels of the pipeline's scheduler, which is only read."""
    family = find_family(pipeline, TOOL)
    if not family.flow_matching:
        return diffusion_coefficients(pipeline.scheduler, num_steps, legacy_inversion)
    if legacy_inversion:
        raise ValueError(
            "`legacy_inversion` must be False for a flow-matching model, got True: it was never published for one."
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
        pipeline: of a family of golden noise; left as it is.
        latents: `(batch, channels, height, width)`, unit noise (before `init_noise_sigma`), unpacked also for Flux.
        prompt_embeds: `(batch, tokens, dim)`, one prompt a sample.
        negative_prompt_embeds: the same shape; needed where a guidance scale is not 1, unless the model takes it as an
            input.
        num_steps: steps of the sampler's grid whose first step is taken: the fewer, the stronger.
        w1: guidance scale of the step down.
        w2: guidance scale of the step up.
        legacy_inversion: the published form, whose step up begins one level too low.
        text: further fields of `TextConditioning`: `pooled_prompt_embeds` and `negative_pooled_prompt_embeds` (SDXL,
            SD3, Flux), masks and second embeddings.

    Returns:
        float32, the shape of `latents`. Its energy is a little off; `match_energy` brings it back.
    """
    conditioning = TextConditioning(prompt_embeds, negative_prompt_embeds, **text)
    return redenoise_text(
        pipeline, latents, conditioning, num_steps=num_steps, w1=w1, w2=w2, legacy_inversion=legacy_inversion
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
    pipeline: DiffusionPipeline, latents: torch.Tensor, text: TextConditioning, *, repeats: int, **step: float
) -> torch.Tensor:
    """Re-denoise again and again, each time from the noise before, brought back to its energy.

    Each of the `repeats` calls the denoiser twice; `step` is `num_steps`, `w1`, `w2` and `legacy_inversion`, as in
    `redenoise`. Returns `(batch, repeats, channels, height, width)` float32.
    """
    if not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"`repeats` must be an integer of at least 1, got {repeats}.")
    source = noise = latents.float()
    states = []
    for _ in range(repeats):
        noise = match_energy(redenoise_text(pipeline, noise, text, **step), source)
        states.append(noise)
    return torch.stack(states, 1)
