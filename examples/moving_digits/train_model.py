"""Train a bundled moving-digits model: a 3-D autoencoder, then a transformer. Under an hour on 2 cores.

CogVideoX learns its T5 encoder, too; Wan reads that encoder, frozen, and is done in 45 minutes.

python examples/moving_digits/train_model.py --output_dir examples/moving_digits/model
python examples/moving_digits/train_model.py --architecture wan --output_dir examples/moving_digits_wan/model
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from diffusers.optimization import get_cosine_schedule_with_warmup
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, only this folder is on the path

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.training.run.loop import LoopSettings, TrainingLoop
from examples.arguments import save_in_half_precision
from examples.moving_digits import networks as cogvideox
from examples.moving_digits.check_model import MODEL_DIR, WAN_DIR
from examples.moving_digits.clips import MovingDigits, to_pixels
from examples.moving_digits.train_denoiser import train_denoiser
from examples.moving_digits_wan import networks as wan


@dataclass(frozen=True)
class Architecture:
    """A model's untrained networks, and how long and how fast they learn."""

    networks: ModuleType
    vae_class: type[AutoencoderKLCogVideoX | AutoencoderKLWan]
    folder: Path
    vae_steps: int
    decoder_steps: int
    vae_learning_rate: float
    max_train_steps: int
    train_batch_size: int


ARCHITECTURES = {
    "cogvideox": Architecture(cogvideox, AutoencoderKLCogVideoX, MODEL_DIR, 5000, 0, 1e-3, 3600, 48),
    "wan": Architecture(wan, AutoencoderKLWan, WAN_DIR, 3000, 3000, 2e-3, 4000, 64),
}


def train_vae(
    accelerator: Accelerator,
    digits: MovingDigits,
    vae: AutoencoderKLCogVideoX | AutoencoderKLWan,
    architecture: Architecture,
    steps: int,
    seed: int,
    description: str = "autoencoder",
) -> list[dict[str, float]]:
    """Let what is not frozen of an autoencoder reconstruct clips of moving digits; returns the log."""

    def loss_function(model: torch.nn.Module, batch: list, generator: torch.Generator) -> dict[str, torch.Tensor]:
        pixels = to_pixels(np.stack([digits.clip(entry) for entry in batch]))
        pixels = pixels.to(accelerator.device)
        vae = accelerator.unwrap_model(model)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
        restored = architecture.networks.decode(vae, posterior.mean + posterior.std * noise)
        # The canvas is mostly black: unweighted, the decoder paints every digit in the mean colour.
        ink = pixels.amax(dim=1, keepdim=True) > -0.9
        reconstruction = ((1 + 8 * ink) * (restored - pixels) ** 2).mean()
        divergence = posterior.kl().mean() / pixels[0].numel()
        return {"loss": reconstruction + 1e-4 * divergence, "reconstruction": reconstruction}

    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=architecture.vae_learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 50, steps)
    settings = LoopSettings(steps, train_batch_size=8, seed=seed, logging_steps=50, description=description)
    loop = TrainingLoop(accelerator, vae, optimizer, digits, loss_function, settings, schedule, collate_fn=list)
    loop.run().eval()
    return loop.history


def train_decoder(
    accelerator: Accelerator,
    digits: MovingDigits,
    vae: AutoencoderKLWan,
    architecture: Architecture,
    steps: int,
    seed: int,
) -> list[dict[str, float]]:
    """Go on with the decoder alone; latents stay, so that a transformer can learn them meanwhile. Returns the log."""
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    return train_vae(accelerator, digits, vae, architecture, steps, seed, "decoder")


@torch.no_grad()
def encode_some(
    vae: AutoencoderKLCogVideoX | AutoencoderKLWan, digits: MovingDigits, count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of `count` random entries.

    Returns:
        Latents as they are encoded `(count, frames, channels, height, width)` float32, the entries `(count, 2)`.
    """
    device = next(vae.parameters()).device
    picks = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))[:count]
    entries = [digits[index] for index in picks.tolist()]
    latents = []
    for start in tqdm(range(0, len(entries), 64), desc="encode"):
        clips = np.stack([digits.clip(entry) for entry in entries[start : start + 64]])
        latents.append(vae.encode(to_pixels(clips).to(device)).latent_dist.mean.transpose(1, 2))
    return torch.cat(latents), torch.tensor(entries)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="cogvideox")
    parser.add_argument("--output_dir", type=Path, help="[the bundled folder of the architecture]")
    parser.add_argument("--vae", help="a trained autoencoder's folder, to train the rest only")
    parser.add_argument("--vae_steps", type=int, help="[5000; 3000 for Wan]")
    parser.add_argument("--decoder_steps", type=int, help="of the decoder alone after these [0; 3000 for Wan]")
    parser.add_argument("--clips", type=int, default=12_000, help="clips the transformer learns")
    parser.add_argument("--max_train_steps", type=int, help="[3600; 4000 for Wan]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(input_args)
    architecture = ARCHITECTURES[args.architecture]
    args.output_dir = args.output_dir or architecture.folder
    for name in ("vae_steps", "decoder_steps", "max_train_steps"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(architecture, name))
    return args


def write_log(args: argparse.Namespace, part: str, began: float, history: list) -> None:
    """Add a part, which began at `began` of `time.perf_counter`, to the log beside the model."""
    path = args.output_dir.parent / "train_log.json"
    log = json.loads(path.read_text()) if path.exists() else {}
    log[part] = {
        "seconds": round(time.perf_counter() - began),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "arguments": {k: v for k, v in vars(args).items() if isinstance(v, int)},
        "history": history,
    }
    write_atomically(path, json.dumps(log, indent=1) + "\n")


def main(args: argparse.Namespace) -> None:
    """Train both parts and save the pipeline in float16, with the log beside it."""
    accelerator, architecture = Accelerator(), ARCHITECTURES[args.architecture]
    set_seed(args.seed)
    digits, began = MovingDigits(), time.perf_counter()
    if args.vae is None:
        vae = architecture.networks.build_vae()
        history = train_vae(accelerator, digits, vae, architecture, args.vae_steps, args.seed)
        write_log(args, "autoencoder", began, history)
        if args.decoder_steps:
            began = time.perf_counter()
            history = train_decoder(accelerator, digits, vae, architecture, args.decoder_steps, args.seed)
            write_log(args, "decoder", began, history)
        vae.save_pretrained(args.output_dir / "vae")
    else:
        vae = architecture.vae_class.from_pretrained(args.vae).to(accelerator.device)
    began = time.perf_counter()
    latents, entries = encode_some(vae, digits, args.clips, args.seed)
    latents = architecture.networks.normalize(vae, latents)
    pipeline = architecture.networks.build_pipeline(vae)
    model = architecture.networks.TextToVelocity(pipeline)
    history = train_denoiser(
        accelerator, digits, latents, entries, model, args.max_train_steps, architecture.train_batch_size, args.seed
    )
    save_in_half_precision(pipeline, args.output_dir)
    write_log(args, "transformer", began, history)


if __name__ == "__main__":
    main(parse_args())
