"""Plain LoRA fine-tuning of an erased video model on other clips: does the concept grow back?

Fine-tuning on harmless data is known to bring erased concepts back; UnlearnDiffAtk (Zhang et al. 2024, arXiv
2310.11868) and others judge erasers under it. LoRA: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

import torch
from diffusers import SchedulerMixin
from tqdm.auto import tqdm

from diffusers_ext.core.capture import Targets, find_modules
from diffusers_ext.core.restored_state import module_eval_mode
from diffusers_ext.core.seeds import check_diffusion_levels
from diffusers_ext.eraser.losses import velocity_distance
from diffusers_ext.families.family import Velocity
from diffusers_ext.families.predictions import predicted_of, scheduler_level
from diffusers_ext.families.text_conditioning import Text

# Of every attention, whatever the family calls it, that has a projection of its own for each.
ATTENTION_PROJECTIONS = tuple(f"*.att*.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))


class FinetunedLora:
    """A LoRA that changes the transformer only while its context is open: `with lora: ...`.

    `W x + b + (alpha / rank) B A x`, `A` uniform as Linear layers start, `B` zero, both float32. It is added by hooks,
    so that modules, keys and other adapters are never touched. Fused projections are refused: their single parts do
    not run.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rank: int,
        alpha: float,
        targets: Targets,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}.")
        if any(getattr(module, "fused_projections", False) for module in model.modules()):
            raise ValueError("`model` must not have fused projections, got some. Call `unfuse_qkv_projections`.")
        self.scale = alpha / rank
        self.losses: list[float] = []
        self.layers = find_modules(model, targets)
        self.weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for name, layer in self.layers.items():
            if not hasattr(layer, "in_features"):
                raise ValueError(f"`targets` must match Linear layers, got {name}, a {type(layer).__name__}.")
            bound = 1 / math.sqrt(layer.in_features)
            down = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
            up = torch.zeros(layer.out_features, rank, device=device)
            self.weights[name] = (down.to(device).requires_grad_(), up.requires_grad_())

    @property
    def parameters(self) -> list[torch.Tensor]:
        """All `A` and `B`, layer by layer."""
        return [weight for pair in self.weights.values() for weight in pair]

    def __enter__(self) -> FinetunedLora:
        if self._hooks:
            raise ValueError("The context of a `FinetunedLora` must be opened once, got it open.")
        for name, layer in self.layers.items():
            self._hooks.append(layer.register_forward_hook(self._hook(*self.weights[name])))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _hook(self, down: torch.Tensor, up: torch.Tensor) -> Any:
        def add(layer: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            change = args[0].to(down.dtype) @ down.T @ up.T
            return output + (self.scale * change).to(output.dtype)

        return add


def finetune_lora(
    velocity: Velocity,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    prompt_embeds: Text,
    *,
    steps: int = 100,
    rank: int = 16,
    alpha: float | None = None,
    targets: Targets = ATTENTION_PROJECTIONS,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    batch_size: int = 4,
    seed: int = 0,
) -> FinetunedLora:
    """Train a LoRA with the model's own loss, `||v(x_t, c, t) - v||^2` at uniform timesteps, by AdamW.

    Erasers stay on and fixed. The model is run in eval mode; its parameters, gradients, modes and adapters stay as
    they are, and so does torch's random state. The LoRA is not in effect until its context is opened; it carries the
    `losses`.

    Args:
        velocity: of the transformer with its erasers.
        scheduler: the pipeline's, of a prediction type of the velocity; adds the noise. Where the velocity is that of
            flow matching, only its number of timesteps is read: `x_t = (1 - sigma) x_0 + sigma noise`.
        latents: `(clips, frames, channels, height, width)` of clean clips, scaled by the VAE's factor, on the model's
            device.
        prompt_embeds: `(clips, text, text_dim)`, their prompts, as the velocity takes them.
    """
    if not len(latents) or len(latents) != len(prompt_embeds):
        raise ValueError(
            "`prompt_embeds` must have one row per clip and `latents` some clips, got "
            f"{len(prompt_embeds)} and {len(latents)}."
        )
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    if not velocity.flow_matching:
        if scheduler.config.prediction_type not in velocity.prediction_types:
            wanted = " or ".join(map(repr, velocity.prediction_types))
            raise ValueError(
                f"`scheduler` must be of prediction_type {wanted}, got {scheduler.config.prediction_type!r}."
            )
        check_diffusion_levels(scheduler)
    predicted = "flow_prediction" if velocity.flow_matching else scheduler.config.prediction_type
    generator = torch.Generator().manual_seed(seed)
    device = latents.device
    alpha = rank if alpha is None else alpha
    lora = FinetunedLora(velocity.model, rank, alpha, targets, generator, device)
    optimizer = torch.optim.AdamW(lora.parameters, lr=learning_rate, weight_decay=weight_decay)
    timesteps = scheduler.config.num_train_timesteps
    with lora, module_eval_mode(velocity.model), torch.enable_grad():
        for _ in tqdm(range(steps), desc="fine-tune LoRA"):
            chosen = torch.randperm(len(latents), generator=generator)[:batch_size].to(device)
            x_0 = latents[chosen].float()
            t = torch.randint(timesteps, (len(chosen),), generator=generator).to(device)
            noise = torch.randn(x_0.shape, generator=generator).to(device)
            level = scheduler_level(scheduler, t, x_0, flow_matching=velocity.flow_matching)
            x_t = x_0.lerp(noise, level.sigma) if velocity.flow_matching else level.signal * x_0 + level.sigma * noise
            x_t = velocity.with_image(x_t, chosen.tolist())  # the first frame of a clip is its own
            target = predicted_of(x_0, noise, level, predicted)
            loss = velocity_distance(velocity(x_t, t, prompt_embeds[chosen]), target)
            # Not `backward`: erasers that are trainable must not collect gradients.
            gradients = torch.autograd.grad(loss, lora.parameters)
            for weight, gradient in zip(lora.parameters, gradients):
                weight.grad = gradient
            optimizer.step()
            lora.losses.append(loss.item())
    for weight in lora.parameters:
        weight.grad = None
    return lora
