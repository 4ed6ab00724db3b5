"""Train the bundled moving-digits CogVideoX: a 3-D autoencoder, then a transformer with its T5 encoder.

Under an hour on 2 cores.

python examples/moving_digits/train_model.py --output_dir examples/moving_digits/model
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, only this folder is on the path

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.training.run.loop import LoopSettings, TrainingLoop
from examples.arguments import save_in_half_precision
from examples.moving_digits.clips import MovingDigits, to_pixels
from examples.moving_digits.networks import build_scheduler, build_text_encoder, build_transformer, build_vae
from examples.moving_digits.prompts import make_tokenizer
from examples.moving_digits.train_denoiser import train_denoiser


def train_vae(
    accelerator: Accelerator, digits: MovingDigits, steps: int, seed: int
) -> tuple[AutoencoderKLCogVideoX, list[dict[str, float]]]:
    """Reconstruct clips of moving digits; returns the log, too."""

    def loss_function(model: torch.nn.Module, batch: list, generator: torch.Generator) -> dict[str, torch.Tensor]:
        pixels = to_pixels(np.stack([digits.clip(entry) for entry in batch]))
        pixels = pixels.to(accelerator.device)
        vae = accelerator.unwrap_model(model)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
        restored = vae.decode(posterior.mean + posterior.std * noise).sample
        # The canvas is mostly black: unweighted, the decoder paints every digit in the mean colour.
        ink = pixels.amax(dim=1, keepdim=True) > -0.9
        reconstruction = ((1 + 8 * ink) * (restored - pixels) ** 2).mean()
        divergence = posterior.kl().mean() / pixels[0].numel()
        return {"loss": reconstruction + 1e-4 * divergence, "reconstruction": reconstruction}

    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 50, steps)
    settings = LoopSettings(steps, train_batch_size=8, seed=seed, logging_steps=50, description="autoencoder")
    loop = TrainingLoop(accelerator, vae, optimizer, digits, loss_function, settings, schedule, collate_fn=list)
    return loop.run().eval(), loop.history


@torch.no_grad()
def encode_some(
    vae: AutoencoderKLCogVideoX, digits: MovingDigits, count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Latents of `count` random entries.

    Returns:
        Scaled latents `(count, frames, channels, height, width)` float32, the entries `(count, 2)`, and the scaling
        factor that gives the latents unit variance.
    """
    device = next(vae.parameters()).device
    picks = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))[:count]
    entries = [digits[index] for index in picks.tolist()]
    latents = []
    for start in tqdm(range(0, len(entries), 64), desc="encode"):
        clips = np.stack([digits.clip(entry) for entry in entries[start : start + 64]])
        latents.append(vae.encode(to_pixels(clips).to(device)).latent_dist.mean.transpose(1, 2))
    latents = torch.cat(latents)
    scaling_factor = 1.0 / latents.std().item()
    return latents * scaling_factor, torch.tensor(entries), scaling_factor


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--vae", help="a trained autoencoder's folder, to train the rest only")
    parser.add_argument("--vae_steps", type=int, default=5000)
    parser.add_argument("--clips", type=int, default=12_000, help="clips the transformer learns")
    parser.add_argument("--max_train_steps", type=int, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(input_args)


def write_log(args: argparse.Namespace, part: str, seconds: float, history: list) -> None:
    """Add a part to the log beside the model."""
    path = args.output_dir.parent / "train_log.json"
    log = json.loads(path.read_text()) if path.exists() else {}
    log[part] = {
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "arguments": {k: v for k, v in vars(args).items() if isinstance(v, int)},
        "history": history,
    }
    write_atomically(path, json.dumps(log, indent=1) + "\n")


def main(args: argparse.Namespace) -> None:
    """Train both parts and save the pipeline in float16, with the log beside it."""
    accelerator = Accelerator()
    set_seed(args.seed)
    digits, began = MovingDigits(), time.perf_counter()
    if args.vae is None:
        vae, history = train_vae(accelerator, digits, args.vae_steps, args.seed)
        vae.save_pretrained(args.output_dir / "vae")
        write_log(args, "autoencoder", time.perf_counter() - began, history)
    else:
        vae = AutoencoderKLCogVideoX.from_pretrained(args.vae).to(accelerator.device)
    began = time.perf_counter()
    latents, entries, scaling_factor = encode_some(vae, digits, args.clips, args.seed)
    vae.register_to_config(scaling_factor=scaling_factor)
    tokenizer = make_tokenizer()
    pipeline = CogVideoXPipeline(tokenizer, build_text_encoder(tokenizer), vae, build_transformer(), build_scheduler())
    history = train_denoiser(accelerator, digits, latents, entries, pipeline, args.max_train_steps, args.seed)
    save_in_half_precision(pipeline, args.output_dir)
    write_log(args, "transformer", time.perf_counter() - began, history)


if __name__ == "__main__":
    main(parse_args())
