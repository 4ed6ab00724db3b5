"""Training of the moving-digits transformer together with its text encoder, on latents of real clips."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.utils.data import TensorDataset
from transformers import T5EncoderModel

from diffusers_ext.training.run.loop import LoopSettings, TrainingLoop
from examples.moving_digits.clips import CANVAS, MovingDigits
from examples.moving_digits.networks import LATENT_FRAMES
from examples.moving_digits.prompts import NEUTRAL_COLOR, NEUTRAL_DIGIT, PROMPT_LENGTH, TEMPLATES


class TextToVelocity(torch.nn.Module):
    """Text encoder and transformer as one trainable module."""

    def __init__(self, text_encoder: T5EncoderModel, transformer: CogVideoXTransformer3DModel, rotary: tuple) -> None:
        super().__init__()
        self.text_encoder, self.transformer, self.rotary = text_encoder, transformer, rotary

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        prompt_embeds = self.text_encoder(input_ids)[0]
        return self.transformer(latents, prompt_embeds, timesteps, image_rotary_emb=self.rotary, return_dict=False)[0]


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
    pipeline: CogVideoXPipeline, steps: int, seed: int,
) -> list[dict[str, float]]:  # fmt: skip
    """Predict velocity in latents from a prompt; the pipeline gets the averaged weights. Returns the log."""
    scheduler, tokenizer = pipeline.scheduler, pipeline.tokenizer

    def loss_function(model: torch.nn.Module, batch: list, generator: torch.Generator) -> dict[str, torch.Tensor]:
        clean, picks = batch[0].to(accelerator.device), batch[1][:, 1].tolist()
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        timesteps = torch.randint(1000, (len(clean),), generator=generator).to(clean.device)
        prompts = caption([digits.combinations[pick] for pick in picks], generator)
        tokens = tokenizer(prompts, padding="max_length", max_length=PROMPT_LENGTH, return_tensors="pt").input_ids
        noisy = scheduler.add_noise(clean, noise, timesteps)
        prediction = model(noisy, timesteps, tokens.to(clean.device))
        return {"loss": F.mse_loss(prediction, scheduler.get_velocity(clean, noise, timesteps))}

    rotary = pipeline._prepare_rotary_positional_embeddings(CANVAS, CANVAS, LATENT_FRAMES, accelerator.device)
    model = TextToVelocity(pipeline.text_encoder, pipeline.transformer, rotary)
    model.to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    ema = EMAModel(model.parameters(), decay=0.997)
    settings = LoopSettings(steps, train_batch_size=48, seed=seed, logging_steps=50, description="transformer")
    dataset = TensorDataset(latents.cpu(), entries)
    loop = TrainingLoop(accelerator, model, optimizer, dataset, loss_function, settings, schedule, ema=ema)
    model = loop.run().eval()
    ema.copy_to(model.parameters())
    return loop.history
