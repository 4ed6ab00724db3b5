"""ESD-x (Gandikota et al. 2023, arXiv 2303.07345), equation 7: a concept erased by training the cross-attention.

    loss = |e_theta(x_t, c, t) - (e_0(x_t, t) - eta (e_0(x_t, c, t) - e_0(x_t, t)))|^2

`e_0` is the frozen model. x_t comes from a run of the trained model for the concept, with guidance, that is stopped at
a step drawn at random. The paper's settings: 1000 steps of one picture, eta 1, guidance 3 while sampling, Adam. Its
sampler takes 50 steps; here it takes as many as the model is drawn with, which is faster.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.nullspace.text_only import denoiser_arguments


def negative_guidance(concept: torch.Tensor, empty: torch.Tensor, eta: float) -> torch.Tensor:
    """The target of the loss, from two predictions of the frozen model."""
    return empty - eta * (concept - empty)


def cross_attention_parameters(unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What ESD-x trains."""
    return {name: parameter for name, parameter in unet.named_parameters() if ".attn2." in name}


@torch.no_grad()
def partial_run(
    pipeline: StableDiffusionPipeline,
    concept: torch.Tensor,
    empty: torch.Tensor,
    steps: int,
    num_inference_steps: int,
    guidance_scale: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents after the first `steps` of a run for the concept, and the timestep they have come to."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    scheduler.set_timesteps(num_inference_steps)
    size = unet.config.sample_size
    latents = torch.randn(1, unet.config.in_channels, size, size, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps[:steps]:
        both = scheduler.scale_model_input(latents.expand(2, -1, -1, -1), timestep)
        without, told = unet(both, timestep, torch.cat([empty, concept])).sample.chunk(2)
        guided = without + guidance_scale * (told - without)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents, scheduler.timesteps[steps]


def erase_by_training(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int = 1000,
    learning_rate: float = 1e-5,
    eta: float = 1.0,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    seed: int = 0,
) -> list[float]:
    """Train the UNet's cross-attention in place; returns the losses.

    Args:
        prompts: of the concept, one drawn for each step; the paper's is its name alone.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = denoiser_arguments(pipeline, ["", *prompts])["encoder_hidden_states"]
    empty, unet = embeddings[:1], pipeline.unet
    frozen = copy.deepcopy(unet).requires_grad_(False)
    unet.requires_grad_(False)
    parameters = list(cross_attention_parameters(unet).values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    losses = []
    for _ in tqdm(range(steps), desc="ESD-x"):
        picked = 1 + int(torch.randint(len(prompts), (), generator=generator))
        concept = embeddings[picked : picked + 1]
        stop = int(torch.randint(num_inference_steps, (), generator=generator))
        latents, timestep = partial_run(pipeline, concept, empty, stop, num_inference_steps, guidance_scale, generator)
        with torch.no_grad():
            both = frozen(latents.expand(2, -1, -1, -1), timestep, torch.cat([empty, concept])).sample
        target = negative_guidance(both[1:], both[:1], eta)
        loss = torch.nn.functional.mse_loss(unet(latents, timestep, concept).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    unet.requires_grad_(False)
    return losses
