"""ESD-x of video models, as a LoRA; the loss is that of `esd`, on velocities, where it is the same up to a factor.

ESD-x trains cross-attention. Where text and video share one attention (CogVideoX), there is none apart, and the LoRA
lies on the projections of the shared one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from tqdm.auto import tqdm

from benchmarks.baselines.esd import negative_guidance
from benchmarks.baselines.nag import text_attentions
from diffusers_ext.families.family import Velocity

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@torch.no_grad()
def stopped_run(
    velocity: Velocity, scheduler: object, start: torch.Tensor, texts: torch.Tensor, steps: int, guidance_scale: float
) -> torch.Tensor:
    """Latents after the first `steps` of a guided run from noise; `texts` are the empty one and the concept's.

    The scheduler's timesteps are set.
    """
    latents = start
    for timestep in scheduler.timesteps[:steps]:
        both = velocity(latents.expand(2, *start.shape[1:]), timestep.expand(2), texts)
        without, told = both.chunk(2)
        latents = scheduler.step(without + guidance_scale * (told - without), timestep, latents).prev_sample
    return latents


def erase_video_concept(
    pipeline: DiffusionPipeline,
    velocity: Velocity,
    latent_shape: Sequence[int],
    texts: torch.Tensor,
    *,
    learning_rate: float,
    steps: int = 1000,
    rank: int = 32,
    eta: float = 1.0,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    seed: int = 0,
) -> list[float]:
    """Train a LoRA named `esd`, which stays in the transformer, switched on; returns the losses.

    Args:
        velocity: of the pipeline's transformer.
        latent_shape: of a clip, as the velocity takes it, without the batch.
        texts: `(1 + n, tokens, width)`, the empty one and prompts of the concept, one of which is drawn each step.
    """
    generator, scheduler = torch.Generator().manual_seed(seed), copy.deepcopy(pipeline.scheduler)
    transformer = pipeline.transformer.requires_grad_(False)
    targets = [f"{name}.{part}" for name in text_attentions(transformer) for part in _PROJECTIONS]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), "esd")
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    losses = []
    for _ in tqdm(range(steps), desc="ESD-x"):
        picked = 1 + int(torch.randint(len(texts) - 1, (), generator=generator))
        told = texts[[0, picked]]
        stop = int(torch.randint(num_inference_steps, (), generator=generator))
        scheduler.set_timesteps(num_inference_steps)
        start = torch.randn(1, *latent_shape, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
        latents = stopped_run(velocity, scheduler, start, told, stop, guidance_scale)
        timestep = scheduler.timesteps[stop].expand(1)
        with torch.no_grad():
            transformer.disable_adapters()
            without, concept = velocity(latents.expand(2, *latent_shape), timestep.expand(2), told).chunk(2)
            transformer.enable_adapters()
        loss = torch.nn.functional.mse_loss(
            velocity(latents, timestep, told[1:]), negative_guidance(concept, without, eta)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    transformer.requires_grad_(False)
    return losses
