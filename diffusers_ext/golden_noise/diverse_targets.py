"""Golden noise that spreads what a model draws for one prompt: pairs by which a network learns diversity.

With P the model's prediction of the picture in the first step of the sampler, which decides the layout, and m its mean
over a few fixed noises for the same text, the noise x of a seed gets the goal

    y = m + (1 + s) (P(x) - m),

which is what the dial `diversity` makes of the prediction, and moves towards it: gradient descent on |P(x') - y|^2
with the energy of every ring of frequency kept, as in `ascend_reward`. Each seed moves in its own direction, so that
pictures move apart, not somewhere else together. Pictures are drawn by the network's user with no further calls of
the denoiser. At which reward they are drawn is the filter's matter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.restored_state import eval_mode
from diffusers_ext.families import find_family
from diffusers_ext.families.family import TextConditioning
from diffusers_ext.families.predictions import predicted_x_0
from diffusers_ext.golden_noise.diversity import check_levels, mean_prediction
from diffusers_ext.golden_noise.redenoise import TOOL, guided_prediction
from diffusers_ext.golden_noise.reward_targets import ascend_reward

Predict = Callable[[torch.Tensor], torch.Tensor]  # of noises `(batch, channels, height, width)`: as large


def differentiable_prediction(
    pipeline: DiffusionPipeline, text: TextConditioning, *, num_steps: int, guidance_scale: float
) -> Predict:
    """What the model predicts of the picture in the first of `num_steps`, by unit noise, with a gradient.

    Args:
        pipeline: of a family of golden noise; left as it is.
        text: one prompt a sample.
        guidance_scale: as of the pipeline's call.
    """
    family, denoiser = find_family(pipeline, TOOL), denoiser_of(pipeline)
    kind = check_levels(pipeline.scheduler, family, "`target` must not be 'diversity'")
    guidance = guidance_scale + getattr(family, "guidance_offset", 0.0)
    if not family.embedded_guidance(denoiser.config):
        guidance = max(guidance, 1.0)  # below, pipelines are not guided

    def predict(noise: torch.Tensor) -> torch.Tensor:
        scheduler, (height, width) = copy.deepcopy(pipeline.scheduler), noise.shape[-2:]
        patch = family.patch(denoiser.config)
        tokens = (height // patch) * (width // patch)
        grid = family.grid_arguments(scheduler.config, num_steps, tokens) if family.flow_matching else {}
        scheduler.set_timesteps(num_steps, **grid)
        first = scheduler.timesteps[0]
        level = family.level(scheduler, first.expand(len(noise)), noise)
        with eval_mode(pipeline):
            output = guided_prediction(pipeline, noise, first, text, guidance)
        return predicted_x_0(output, noise, level, kind)

    return predict


def spread_noise(noise: torch.Tensor, predict: Predict, *, gain: float, steps: int, rate: float) -> torch.Tensor:
    """Noise whose prediction is `gain` further from the prompt's mean one, as near as `steps` of `rate` come to it.

    Args:
        noise: `(batch, channels, height, width)`, unit variance, float32.
        predict: differentiable; a sample's must depend on its own noise alone.
        gain: s.
        rate: length of a step, as a share of the noise's deviation.
    """
    if not gain > 0:
        raise ValueError(f"`gain` must be positive, got {gain}.")
    with torch.no_grad():
        mean = mean_prediction(predict, noise)
        goal = mean + (1 + gain) * (predict(noise) - mean)

    def nearness(x: torch.Tensor) -> torch.Tensor:
        return -(predict(x) - goal).square().flatten(1).mean(1)

    return ascend_reward(noise, nearness, steps=steps, rate=rate)
