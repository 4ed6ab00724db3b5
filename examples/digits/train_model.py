"""Train the bundled digits model: an autoencoder, then a denoiser with its text encoder. About 20 minutes on 2 cores.

python examples/digits/train_model.py --output_dir examples/digits/model
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.utils.data import Dataset, TensorDataset
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, only this folder is on the path

from diffusers_ext.training.run.loop import LoopSettings, TrainingLoop
from examples.arguments import save_in_half_precision
from examples.digits.pictures import IMAGE_SIZE, real_digits, tint
from examples.digits.prompts import COLORS, DIGITS, PROMPT_LENGTH, TEMPLATES, TRAINING_PAIRS, make_tokenizer

TEXT_WIDTH = 128
SHIFTS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-2, 0, 2))


def build_vae() -> AutoencoderKL:
    """32x32 RGB to 8x8x4 latents."""
    return AutoencoderKL(
        block_out_channels=(24, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """2.6 M parameters, cross-attention at both resolutions."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=(56, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model for `tokenizer`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """Pictures `(n, 32, 32, 3)` uint8 as `(n, 3, 32, 32)` float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class TintedDigits(Dataset):
    """Every real digit in every tint it is trained with; `__getitem__` gives (ink index, colour index)."""

    def __init__(self) -> None:
        self.ink, self.labels = real_digits()
        pairs = {(color, DIGITS.index(digit)) for color, digit in TRAINING_PAIRS}
        colors = list(COLORS)
        self.entries = [
            (i, c) for i, label in enumerate(self.labels) for c in range(len(colors)) if (colors[c], label) in pairs
        ]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.entries[index]

    def picture(self, entry: tuple[int, int], shift: tuple[int, int]) -> np.ndarray:
        """One tinted picture, `(32, 32, 3)` uint8."""
        return tint(self.ink[entry[0]], list(COLORS)[entry[1]], shift)


def train_vae(accelerator: Accelerator, digits: TintedDigits, steps: int, seed: int) -> AutoencoderKL:
    """Reconstruct tinted digits; pictures are moved by up to two pixels."""

    def loss_function(model: torch.nn.Module, batch: list, generator: torch.Generator) -> dict[str, torch.Tensor]:
        picks = torch.randint(len(SHIFTS), (len(batch),), generator=generator)
        pictures = np.stack([digits.picture(entry, SHIFTS[pick]) for entry, pick in zip(batch, picks, strict=True)])
        pixels = to_pixels(pictures).to(accelerator.device)
        posterior = accelerator.unwrap_model(model).encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
        restored = accelerator.unwrap_model(model).decode(posterior.mean + posterior.std * noise).sample
        reconstruction = F.l1_loss(restored, pixels) + F.mse_loss(restored, pixels)
        divergence = posterior.kl().mean() / pixels[0].numel()
        return {"loss": reconstruction + 1e-3 * divergence, "reconstruction": reconstruction}

    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 50, steps)
    settings = LoopSettings(steps, train_batch_size=48, seed=seed, logging_steps=50, description="autoencoder")
    loop = TrainingLoop(accelerator, vae, optimizer, digits, loss_function, settings, schedule, collate_fn=list)
    return loop.run().eval()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, digits: TintedDigits) -> tuple[torch.Tensor, float]:
    """Latent means of every entry at every shift, and the scaling factor that gives them unit variance.

    Returns:
        `(entries, shifts, 4, 8, 8)` float32, scaled.
    """
    device = next(vae.parameters()).device
    latents = []
    for start in range(0, len(digits), 64):
        entries = digits.entries[start : start + 64]
        pixels = to_pixels(np.stack([digits.picture(entry, shift) for entry in entries for shift in SHIFTS]))
        latents.append(vae.encode(pixels.to(device)).latent_dist.mean.unflatten(0, (-1, len(SHIFTS))))
    latents = torch.cat(latents)
    scaling_factor = 1.0 / latents.std().item()
    return latents * scaling_factor, scaling_factor


class TextToNoise(torch.nn.Module):
    """Text encoder and UNet as one trainable module."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return self.unet(latents, timesteps, self.text_encoder(input_ids)[0]).sample


def write_prompts(entries: torch.Tensor, digits: TintedDigits, generator: torch.Generator) -> list[str]:
    """A random template per sample; one in ten is empty (guidance), one in ten leaves the colour out."""
    prompts = []
    for ink, color in entries.tolist():
        kind = torch.rand((), generator=generator).item()
        template = TEMPLATES[int(torch.randint(len(TEMPLATES), (), generator=generator))]
        if kind < 0.2 and kind >= 0.1:
            template = template.replace("{color} ", "").replace(" in {color}", "")
        digit = DIGITS[digits.labels[ink]]
        prompts.append("" if kind < 0.1 else template.format(color=list(COLORS)[color], digit=digit))
    return prompts


def train_denoiser(
    accelerator: Accelerator, digits: TintedDigits, latents: torch.Tensor, steps: int, seed: int
) -> tuple[TextToNoise, CLIPTokenizer, list[dict[str, float]]]:
    """Predict the noise in latents from a prompt; the averaged weights are returned."""
    tokenizer, scheduler = make_tokenizer(), build_scheduler()

    def loss_function(model: torch.nn.Module, batch: list, generator: torch.Generator) -> dict[str, torch.Tensor]:
        index, entries = batch
        clean = latents[index, torch.randint(len(SHIFTS), index.shape, generator=generator)]
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        timesteps = torch.randint(1000, index.shape, generator=generator).to(clean.device)
        prompts = write_prompts(entries, digits, generator)
        tokens = tokenizer(prompts, padding="max_length", max_length=PROMPT_LENGTH, return_tensors="pt").input_ids
        prediction = model(scheduler.add_noise(clean, noise, timesteps), timesteps, tokens.to(clean.device))
        return {"loss": F.mse_loss(prediction, noise)}

    model = TextToNoise(build_text_encoder(tokenizer), build_unet()).to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    ema = EMAModel(model.parameters(), decay=0.998)
    dataset = TensorDataset(torch.arange(len(digits)), torch.tensor(digits.entries))
    settings = LoopSettings(steps, train_batch_size=64, seed=seed, logging_steps=50, description="denoiser")
    loop = TrainingLoop(accelerator, model, optimizer, dataset, loss_function, settings, schedule, ema=ema)
    model = loop.run().eval()
    ema.copy_to(model.parameters())
    return model, tokenizer, loop.history


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--vae_steps", type=int, default=1500)
    parser.add_argument("--max_train_steps", type=int, default=3500)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    """Train both parts and save the pipeline in float16, with the log beside it."""
    began = time.perf_counter()
    accelerator = Accelerator()
    set_seed(args.seed)
    digits = TintedDigits()
    vae = train_vae(accelerator, digits, args.vae_steps, args.seed)
    vae_seconds = time.perf_counter() - began
    latents, scaling_factor = encode_all(vae, digits)
    vae.register_to_config(scaling_factor=scaling_factor)
    model, tokenizer, history = train_denoiser(accelerator, digits, latents, args.max_train_steps, args.seed)
    pipeline = StableDiffusionPipeline(
        vae, model.text_encoder, tokenizer, model.unet, build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    save_in_half_precision(pipeline, args.output_dir)
    log = {
        "seconds": {"autoencoder": round(vae_seconds), "all": round(time.perf_counter() - began)},
        "device": str(accelerator.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "arguments": {name: str(value) for name, value in vars(args).items() if name != "output_dir"},
        "denoiser": history,
    }
    (args.output_dir.parent / "train_log.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main(parse_args())
