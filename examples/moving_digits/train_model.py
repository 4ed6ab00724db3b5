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
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm
from transformers import T5Config, T5EncoderModel, T5Tokenizer


sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # run as a file, only this folder is on the path

from diffusers_ext.core.artifacts import write_atomically
from examples.moving_digits.clips import CANVAS, NUM_FRAMES, MovingDigits, to_pixels
from examples.moving_digits.prompts import (
    NEUTRAL_COLOR,
    NEUTRAL_DIGIT,
    PROMPT_LENGTH,
    TEMPLATES,
    make_tokenizer,
)
from training.loop import LoopSettings, TrainingLoop


TEXT_WIDTH, HEADS, HEAD_WIDTH = 64, 6, 16
LATENT_CHANNELS, LATENT_FRAMES, LATENT_SIZE = 16, 3, 4


def build_vae() -> AutoencoderKLCogVideoX:
    """9 frames of 16x16 to 3 of 4x4; three levels, because the pipeline counts on 4 frames a latent."""
    return AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 32),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_height=CANVAS,
        sample_width=CANVAS,
        temporal_compression_ratio=4,
    )


def build_transformer() -> CogVideoXTransformer3DModel:
    """1.1 M parameters, rotary positions as the 5b models, one token a latent pixel."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=TEXT_WIDTH,
        num_layers=4,
        sample_width=LATENT_SIZE,
        sample_height=LATENT_SIZE,
        sample_frames=NUM_FRAMES,
        patch_size=1,
        max_text_seq_length=PROMPT_LENGTH,
        use_rotary_positional_embeddings=True,
    )


def build_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A two-layer T5 encoder for `tokenizer`."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_scheduler() -> CogVideoXDDIMScheduler:
    """The noise schedule of CogVideoX-5b: velocity, zero terminal signal, trailing steps."""
    return CogVideoXDDIMScheduler(
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
    )


def train_vae(
    accelerator: Accelerator, digits: MovingDigits, steps: int, seed: int
) -> tuple[AutoencoderKLCogVideoX, list[dict[str, float]]]:
    """Reconstruct clips of moving digits; returns the log, too."""

    def loss_function(
        model: torch.nn.Module, batch: list, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
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
    settings = LoopSettings(
        steps, train_batch_size=16, seed=seed, logging_steps=25, description="autoencoder"
    )
    loop = TrainingLoop(
        accelerator, vae, optimizer, digits, loss_function, settings, schedule, collate_fn=list
    )
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


class TextToVelocity(torch.nn.Module):
    """Text encoder and transformer as one trainable module."""

    def __init__(
        self, text_encoder: T5EncoderModel, transformer: CogVideoXTransformer3DModel, rotary: tuple
    ) -> None:
        super().__init__()
        self.text_encoder, self.transformer, self.rotary = text_encoder, transformer, rotary

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        prompt_embeds = self.text_encoder(input_ids)[0]
        return self.transformer(
            latents, prompt_embeds, timesteps, image_rotary_emb=self.rotary, return_dict=False
        )[0]


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

    def loss_function(
        model: torch.nn.Module, batch: list, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        clean, picks = batch[0].to(accelerator.device), batch[1][:, 1].tolist()
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        timesteps = torch.randint(1000, (len(clean),), generator=generator).to(clean.device)
        prompts = caption([digits.combinations[pick] for pick in picks], generator)
        tokens = tokenizer(
            prompts, padding="max_length", max_length=PROMPT_LENGTH, return_tensors="pt"
        ).input_ids
        noisy = scheduler.add_noise(clean, noise, timesteps)
        prediction = model(noisy, timesteps, tokens.to(clean.device))
        return {"loss": F.mse_loss(prediction, scheduler.get_velocity(clean, noise, timesteps))}

    rotary = pipeline._prepare_rotary_positional_embeddings(
        CANVAS, CANVAS, LATENT_FRAMES, accelerator.device
    )
    model = TextToVelocity(pipeline.text_encoder, pipeline.transformer, rotary)
    model.to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    ema = EMAModel(model.parameters(), decay=0.997)
    settings = LoopSettings(
        steps, train_batch_size=48, seed=seed, logging_steps=50, description="transformer"
    )
    dataset = TensorDataset(latents.cpu(), entries)
    loop = TrainingLoop(
        accelerator, model, optimizer, dataset, loss_function, settings, schedule, ema=ema
    )
    model = loop.run().eval()
    ema.copy_to(model.parameters())
    return loop.history


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--vae", help="a trained autoencoder's folder, to train the rest only")
    parser.add_argument("--vae_steps", type=int, default=1400)
    parser.add_argument("--clips", type=int, default=12_000, help="clips the transformer learns")
    parser.add_argument("--max_train_steps", type=int, default=2600)
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
    pipeline = CogVideoXPipeline(
        tokenizer, build_text_encoder(tokenizer), vae, build_transformer(), build_scheduler()
    )
    history = train_denoiser(
        accelerator, digits, latents, entries, pipeline, args.max_train_steps, args.seed
    )
    pipeline.to(dtype=torch.float16).save_pretrained(args.output_dir)
    write_log(args, "transformer", time.perf_counter() - began, history)


if __name__ == "__main__":
    main(parse_args())
