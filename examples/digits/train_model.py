"""Train a bundled digits model, in half an hour at most on 2 cores.

Stable Diffusion is an autoencoder, then a UNet with its text encoder; FLUX.2 is a transformer on those of the former.

python examples/digits/train_model.py --output_dir examples/digits/model
python examples/digits/train_model.py --architecture flux2 --output_dir examples/digits_flux2/model
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, Flux2KleinPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.utils.data import Dataset, TensorDataset
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, only this folder is on the path

from diffusers_ext.training.run.checkpoints import Checkpoints
from diffusers_ext.training.run.loop import LoopSettings, TrainingLoop
from examples.arguments import save_in_half_precision
from examples.digits.check_model import MODEL_DIR, load_pipeline
from examples.digits.pictures import IMAGE_SIZE, real_digits, tint
from examples.digits.prompts import COLORS, DIGITS, PROMPT_LENGTH, TEMPLATES, TRAINING_PAIRS, make_tokenizer
from examples.digits_flux2.networks import TextToVelocity, build_pipeline, normalized_patches
from examples.digits_flux2.pipeline import MODEL_DIR as FLUX2_DIR

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
    """The loss of text encoder and UNet, which train as one module."""

    learning_rate = 1.5e-3

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        self._tokenizer, self._scheduler = tokenizer, build_scheduler()

    def draw_times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Timesteps `(count,)`."""
        return torch.randint(1000, (count,), generator=generator)

    def forward(
        self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, prompts: list[str]
    ) -> torch.Tensor:
        """Mean squared error of the noise predicted in latents from their prompts."""
        tokens = self._tokenizer(prompts, padding="max_length", max_length=PROMPT_LENGTH, return_tensors="pt")
        text = self.text_encoder(tokens.input_ids.to(clean.device))[0]
        return F.mse_loss(self.unet(self._scheduler.add_noise(clean, noise, times), times, text).sample, noise)


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
    accelerator: Accelerator,
    digits: TintedDigits,
    latents: torch.Tensor,
    model: TextToNoise | TextToVelocity,
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    """Let a model, which is its own loss, draw latents from prompts; it gets the averaged weights. Returns the log."""

    def loss_function(model: torch.nn.Module, batch: list, generator: torch.Generator) -> dict[str, torch.Tensor]:
        index, entries = batch
        clean = latents[index, torch.randint(len(SHIFTS), index.shape, generator=generator)]
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        times = accelerator.unwrap_model(model).draw_times(len(index), generator).to(clean.device)
        return {"loss": model(clean, noise, times, write_prompts(entries, digits, generator))}

    model.to(accelerator.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=model.learning_rate, weight_decay=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, args.max_train_steps)
    ema = EMAModel(trained, decay=0.998)
    dataset = TensorDataset(torch.arange(len(digits)), torch.tensor(digits.entries))
    settings = LoopSettings(
        args.max_train_steps, train_batch_size=64, seed=args.seed, logging_steps=50, description="denoiser"
    )
    facts = {"architecture": args.architecture, "seed": args.seed, "max_train_steps": args.max_train_steps}
    checkpoints = Checkpoints(
        accelerator, args.output_dir.parent / "checkpoints", facts, args.checkpointing_steps, total_limit=1
    )
    loop = TrainingLoop(
        accelerator, model, optimizer, dataset, loss_function, settings, schedule, checkpoints=checkpoints,
        resume_from_checkpoint=args.resume_from_checkpoint, ema=ema,
    )  # fmt: skip
    loop.run().eval()
    ema.copy_to(trained)
    return loop.history


def train_stable_diffusion(
    accelerator: Accelerator, digits: TintedDigits, args: argparse.Namespace
) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    """Train an autoencoder, then a UNet with its text encoder; returns the log, too."""
    began = time.perf_counter()
    vae = train_vae(accelerator, digits, args.vae_steps, args.seed)
    vae_seconds = time.perf_counter() - began
    latents, scaling_factor = encode_all(vae, digits)
    vae.register_to_config(scaling_factor=scaling_factor)
    tokenizer = make_tokenizer()
    model = TextToNoise(build_text_encoder(tokenizer), build_unet(), tokenizer)
    history = train_denoiser(accelerator, digits, latents, model, args)
    pipeline = StableDiffusionPipeline(
        vae, model.text_encoder, tokenizer, model.unet, build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return pipeline, {"seconds": {"autoencoder": round(vae_seconds)}, "denoiser": history}


def train_flux2(
    accelerator: Accelerator, digits: TintedDigits, args: argparse.Namespace
) -> tuple[Flux2KleinPipeline, dict[str, Any]]:
    """Train a FLUX.2 transformer on the autoencoder and the text encoder of `args.base`; returns the log, too."""
    pipeline = build_pipeline(load_pipeline(args.base).to(accelerator.device))
    latents, scaling_factor = encode_all(pipeline.vae, digits)
    patches = normalized_patches(pipeline, latents / scaling_factor)
    history = train_denoiser(accelerator, digits, patches, TextToVelocity(pipeline), args)
    # Saved as what it is to everyone else: a stock pipeline.
    return Flux2KleinPipeline(**pipeline.components), {"seconds": {}, "denoiser": history}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="stable_diffusion")
    parser.add_argument("--output_dir", type=Path, help="[the bundled folder of the architecture]")
    parser.add_argument("--vae_steps", type=int, default=1500, help="of Stable Diffusion's autoencoder")
    parser.add_argument("--base", default=MODEL_DIR, help="whose autoencoder and text encoder FLUX.2 gets")
    parser.add_argument("--max_train_steps", type=int, help="[3500; 2500 for FLUX.2]")
    parser.add_argument("--checkpointing_steps", type=int, help="of the denoiser")
    parser.add_argument("--resume_from_checkpoint", help="`latest` or a folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(input_args)
    folder, steps, _ = ARCHITECTURES[args.architecture]
    args.output_dir, args.max_train_steps = args.output_dir or folder, args.max_train_steps or steps
    return args


def main(args: argparse.Namespace) -> None:
    """Train all parts and save the pipeline in float16, with the log beside it."""
    began = time.perf_counter()
    accelerator = Accelerator()
    set_seed(args.seed)
    pipeline, log = ARCHITECTURES[args.architecture][2](accelerator, TintedDigits(), args)
    save_in_half_precision(pipeline, args.output_dir)
    log["seconds"] |= {"all": round(time.perf_counter() - began), "processor": round(time.process_time())}
    log = {
        **log,
        "device": str(accelerator.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "arguments": {name: str(value) for name, value in vars(args).items() if isinstance(value, int | str)},
    }
    (args.output_dir.parent / "train_log.json").write_text(json.dumps(log, indent=1) + "\n")


ARCHITECTURES = {
    "stable_diffusion": (MODEL_DIR, 3500, train_stable_diffusion),
    "flux2": (FLUX2_DIR, 2500, train_flux2),
}

if __name__ == "__main__":
    main(parse_args())
