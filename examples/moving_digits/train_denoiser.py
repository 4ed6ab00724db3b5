"""Training of a moving-digits transformer on latents of real clips."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.utils.data import TensorDataset

from diffusers_ext.training.run.loop import LoopSettings, TrainingLoop
from examples.moving_digits.clips import MovingDigits
from examples.moving_digits.prompts import NEUTRAL_COLOR, NEUTRAL_DIGIT, TEMPLATES


def caption(combinations: list[tuple[str, str, str]], generator: torch.Generator) -> list[str]:
    """A random template a clip; of ten one is empty (guidance), one has a neutral digit, one a neutral colour."""
    prompts = []
    for color, digit, direction in combinations:
        kind = torch.rand((), generator=generator).item()
        template = TEMPLATES[int(torch.randint(len(TEMPLATES), (), generator=generator))]
        digit = NEUTRAL_DIGIT if 0.1 <= kind < 0.2 else digit
        color = NEUTRAL_COLOR if 0.2 <= kind < 0.3 else color
        prompt = template.format(color=color, digit=digit, direction=direction)
        prompts.append("" if kind < 0.1 else prompt)
    return prompts


def train_denoiser(
    accelerator: Accelerator, digits: MovingDigits, latents: torch.Tensor, entries: torch.Tensor,
    model: torch.nn.Module, steps: int, batch_size: int, seed: int,
) -> list[dict[str, float]]:  # fmt: skip
    """Let a model, which is its own loss, draw latents from prompts; it gets the averaged weights. Returns the log."""

    def loss_function(model: torch.nn.Module, batch: list, generator: torch.Generator) -> dict[str, torch.Tensor]:
        clean, picks = batch[0].to(accelerator.device), batch[1][:, 1].tolist()
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        times = accelerator.unwrap_model(model).draw_times(len(clean), generator).to(clean.device)
        prompts = caption([digits.combinations[pick] for pick in picks], generator)
        return {"loss": model(clean, noise, times, prompts)}

    model.to(accelerator.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    ema = EMAModel(trained, decay=0.997)
    settings = LoopSettings(steps, batch_size, seed=seed, logging_steps=50, description="transformer")
    dataset = TensorDataset(latents.cpu(), entries)
    loop = TrainingLoop(accelerator, model, optimizer, dataset, loss_function, settings, schedule, ema=ema)
    loop.run().eval()
    ema.copy_to(trained)
    return loop.history
