"""Fine-tuning that is meant not to forget: output preservation, and PEFT's own methods on the same Linears.

Differential output preservation (sd-scripts, pull request 1710) adds to the denoising loss, on pictures whose captions
lack the trigger word,

    weight |e_tuned(x_t, caption, t) - e_base(x_t, caption, t)|^2

Here the captions are the preserved prompts and the pictures the base model's own, one for each. MiCA (arXiv
2604.01694) trains A over the left singular vectors of W with the smallest singular values; OFT (arXiv 2306.07280)
multiplies W by a rotation; OSF (orthogonal subspace fine-tuning, arXiv 2504.07097) freezes the upper half of W's
singular directions and keeps gradients orthogonal to them. All three are PEFT's, on the keys and values of the
cross-attention, where the plain LoRA and the null-space LoRA train, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig, OFTConfig, OSFConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from diffusers_ext.core.seeds import training_schedule
from diffusers_ext.nullspace.step import Condition, DreamBoothLoss
from diffusers_ext.training.nullspace.data import encode_conditions

KEYS_AND_VALUES = r".*attn2\.to_(k|v)"
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: LoraConfig(r=8, lora_alpha=8, target_modules=KEYS_AND_VALUES),
    "MiCA": lambda: LoraConfig(r=8, lora_alpha=8, init_lora_weights="mica", target_modules=KEYS_AND_VALUES),
    "OFT": lambda: OFTConfig(r=0, oft_block_size=32, target_modules=KEYS_AND_VALUES),
    "OSF": lambda: OSFConfig(effective_rank=0.5, target_modules=KEYS_AND_VALUES),
}


@contextmanager
def adapters_off(unet: torch.nn.Module) -> Iterator[None]:
    """Let a UNet compute what it does without its adapters."""
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@dataclass(frozen=True)
class OutputPreservation:
    """The denoising loss, and what the adapter changes of the base model's outputs for other captions."""

    loss: DreamBoothLoss
    latents: torch.Tensor  # (pictures, channels, height, width), scaled
    captions: Condition  # one row for each
    weight: float

    def __call__(
        self, model: torch.nn.Module, batch: list[torch.Tensor], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Losses `loss`, `instance` and `preservation`."""
        instance = self.loss(model, batch, generator)["loss"]
        picked = torch.randint(len(self.latents), (len(batch[0]),), generator=generator)
        latents = self.latents[picked]
        noise = torch.randn(latents.shape, generator=generator)
        scheduler = self.loss.scheduler
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        text = self.captions.of_samples(len(latents), picked)
        with torch.no_grad(), adapters_off(model):
            wanted = self.captions.predict(model, noisy, timesteps, text)
        moved = (self.captions.predict(model, noisy, timesteps, text) - wanted).square().mean()
        return {"loss": instance + self.weight * moved, "instance": instance, "preservation": moved}


@torch.no_grad()
def drawn_latents(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seed: int,
    *,
    num_inference_steps: int = 20,
    batch_size: int = 50,
) -> torch.Tensor:
    """The latents of the model's own pictures, one for each prompt."""
    found = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))]
        run = pipeline(
            batch,
            num_inference_steps=num_inference_steps,
            guidance_scale=3.0,
            generator=generators,
            output_type="latent",
        )
        found.append(run.images)
    return torch.cat(found)


def finetune(
    pipeline: StableDiffusionPipeline,
    config: PeftConfig,
    pictures: TensorDataset,
    instance_prompt: str,
    learning_rate: float,
    *,
    preserved: tuple[torch.Tensor, Condition] | None = None,
    preservation_weight: float = 10.0,
    steps: int = 1000,
    batch_size: int = 8,
    seed: int = 0,
) -> list[float]:
    """Train an adapter of PEFT that stays in the pipeline's UNet; returns the losses.

    Steps, batch, schedule of the rate and clipping are those of the training script.

    Args:
        pictures: as `encode_images` gives them.
        preserved: latents and captions of output preservation; none without it.
        preservation_weight: 10 to 1000 are recommended in its pull request.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # adapters start at random
    loss = DreamBoothLoss(training_schedule(pipeline.scheduler), encode_conditions(pipeline, [instance_prompt]))
    if preserved is not None:
        loss = OutputPreservation(loss, *preserved, preservation_weight)
    unet = pipeline.unet.requires_grad_(False)
    inject_adapter_in_model(config, unet)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
    losses = []
    for _ in tqdm(range(steps), desc=config.peft_type.value):
        picked = torch.randint(len(pictures), (batch_size,), generator=generator)
        value = loss(unet, list(pictures[picked]), generator)["loss"]
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    unet.requires_grad_(False)
    return losses
