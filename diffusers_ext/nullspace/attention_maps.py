"""Where a picture looks in its prompt: cross-attention maps along a real denoising run."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image

from diffusers_ext.core.capture import capture
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.families.registry import denoisers_of, match_family
from diffusers_ext.nullspace.prompts import check_prompt_length, check_prompts
from diffusers_ext.nullspace.slots import find_linears, linear_name, split_linear_name
from diffusers_ext.nullspace.statistics import denoiser_of


class AttentionMaps(NamedTuple):
    """Cross-attention of one picture, averaged over heads."""

    tokens: list[str]  # of the prompt, from its start token to its end token
    timesteps: list[int]
    maps: dict[str, torch.Tensor]  # {layer: (timesteps, tokens, height, width) float32}
    image: Image.Image


@torch.no_grad()
def attention_maps(
    pipeline: DiffusionPipeline,
    prompt: str,
    *,
    layers: str | Sequence[int] = "all",
    steps: str | Sequence[int] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
) -> AttentionMaps:
    """Draw one picture and keep where its positions look in the prompt.

    `softmax(Q K^T / sqrt(head_dim))`, from the outputs of `to_q` and `to_k` as the attention gets them, for the
    conditional half of the batch. The picture is the one drawn without looking.

    Args:
        pipeline: with a `UNet2DConditionModel`; it is left as it was.
        layers: `"all"`, or indices of transformer blocks in natural order.
        steps: which of the scheduler's timesteps to keep, from 0; `"all"`, or five spread evenly when `None`.

    Raises:
        TypeError: another denoiser.
        ValueError: unknown layers or steps, fused projections, or a prompt that is too long.
    """
    denoiser = denoiser_of(pipeline)
    if match_family(denoiser, "nullspace") is None:
        raise TypeError(f"`pipeline` must have a {denoisers_of('nullspace')}, got {type(denoiser)}.")
    check_prompt_length(pipeline, check_prompts([prompt], "prompt"))
    linears = find_linears(denoiser, ("q", "k"), layers)
    steps = _choose_steps(pipeline.scheduler, num_inference_steps, steps)
    recorder = _AttentionRecorder(pipeline, prompt, steps)
    with quiet_run(pipeline), capture(denoiser, linears, recorder.read, side="output"):
        image = pipeline(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=recorder.end_step,
        ).images[0]
    maps = {layer: torch.stack(kept) for layer, kept in recorder.maps.items()}
    return AttentionMaps(recorder.tokens, recorder.timesteps, maps, image)


def _choose_steps(scheduler: SchedulerMixin, num_inference_steps: int, steps: str | Sequence[int] | None) -> list[int]:
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    last = len(scheduler.timesteps) - 1
    if steps is None:
        return spread_steps(last + 1)
    if isinstance(steps, str):
        if steps != "all":
            raise ValueError(f"`steps` must be 'all' or from 0 to {last}, got {steps!r}.")
        return list(range(last + 1))
    steps = sorted({int(step) for step in steps})
    if not steps or steps[0] < 0 or steps[-1] > last:
        raise ValueError(f"`steps` must be from 0 to {last}, got {steps}.")
    return steps


def spread_steps(count: int) -> list[int]:
    """Five of so many steps, spread evenly; all where there are fewer."""
    return sorted(set(torch.linspace(0, count - 1, 5).round().int().tolist()))


def at_steps(maps: AttentionMaps, steps: Sequence[int]) -> AttentionMaps:
    """The maps of some of the kept timesteps, by their positions."""
    timesteps = [maps.timesteps[step] for step in steps]
    chosen = {layer: kept[list(steps)] for layer, kept in maps.maps.items()}
    return maps._replace(timesteps=timesteps, maps=chosen)


class _AttentionRecorder:
    """Keeps the latest queries and keys of every layer and, after chosen steps, their attention."""

    def __init__(self, pipeline: DiffusionPipeline, prompt: str, steps: list[int]) -> None:
        self.denoiser, self.steps = denoiser_of(pipeline), steps
        ids = pipeline.tokenizer(prompt).input_ids
        self.tokens = [pipeline.tokenizer.decode([token]).strip() for token in ids]
        self.features: dict[str, torch.Tensor] = {}
        self.timesteps: list[int] = []
        self.maps: dict[str, list[torch.Tensor]] = {}

    def read(self, name: str, features: torch.Tensor) -> None:
        # Guidance puts the conditional half last.
        self.features[name] = features[-1:]

    def end_step(self, _: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if step in self.steps:
            self.timesteps.append(int(timestep))
            layers = {split_linear_name(name)[0]: None for name in self.features}
            for layer in layers:
                query = self.features[linear_name(layer, "q")]
                key = self.features[linear_name(layer, "k")]
                scores = attention_probabilities(self.denoiser.get_submodule(layer), query, key)
                size = map_size(tensors["latents"].shape[-2:], scores.shape[0])
                kept = scores[:, : len(self.tokens)].T.unflatten(1, size)
                self.maps.setdefault(layer, []).append(kept.cpu())
        return tensors


def attention_probabilities(attention: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Attention of image positions to text tokens, `(positions, tokens)` float32, averaged over heads.

    `query` is `(1, positions, dim)`, `key` `(1, tokens, dim)`; every row of the result sums to 1.
    """
    query, key = (attention.head_to_batch_dim(part.float()) for part in (query, key))
    return attention.get_attention_scores(query, key).mean(0)


def map_size(latent_size: Sequence[int], positions: int) -> tuple[int, int]:
    """Height and width of a layer with so many positions, for latents that are halved per level."""
    height, width = latent_size
    while height * width > positions:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != positions:
        raise ValueError(f"`positions` must be {latent_size} halved, got {positions}.")
    return height, width
