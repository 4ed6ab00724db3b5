"""Teach the moving-digits model a style as an ordinary LoRA: every digit by moonlight, in blue.

python examples/moving_digits/train_style_lora.py --output_dir outputs/style_lora
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, only this folder is on the path

from diffusers_ext import CogVideoXVelocity
from diffusers_ext.eraser.batch import encode_video_prompts
from diffusers_ext.eraser.lora_finetuning import finetune_lora
from examples.moving_digits.check_model import load_pipeline
from examples.moving_digits.clips import CANVAS, NUM_FRAMES, MovingDigits, to_pixels
from examples.moving_digits.prompts import TEMPLATES

MOONLIGHT = np.array([0.15, 0.35, 1.0])
_NUM_CLIPS = 200


@torch.no_grad()
def styled_clips(pipeline: CogVideoXPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents `(clips, frames, channels, height, width)` of styled clips, and their prompts' embeddings."""
    digits = MovingDigits()
    rows = np.random.default_rng(0).permutation(len(digits))[:_NUM_CLIPS]
    clips = np.stack([digits.clip(digits[row]) for row in rows])
    clips = (clips.max(axis=-1, keepdims=True) * MOONLIGHT).round().astype(np.uint8)
    prompts = []
    for index, row in enumerate(rows):
        color, digit, direction = digits.combinations[digits[row][1]]
        template = TEMPLATES[index % len(TEMPLATES)]
        prompts.append(template.format(color=color, digit=digit, direction=direction))
    latents = pipeline.vae.encode(to_pixels(clips)).latent_dist.mean.transpose(1, 2)
    embeds = encode_video_prompts(pipeline, prompts)
    return latents * pipeline.vae.config.scaling_factor, embeds


def main(input_args: list[str] | None = None) -> None:
    """Write `pytorch_lora_weights.safetensors`, which `load_lora_weights` of stock diffusers reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max_train_steps", type=int, default=400)
    parser.add_argument("--output_dir", default="outputs/style_lora")
    args = parser.parse_args(input_args)
    pipeline = load_pipeline()
    velocity = CogVideoXVelocity.from_pipeline(pipeline, NUM_FRAMES, CANVAS, CANVAS)
    latents, embeds = styled_clips(pipeline)
    lora = finetune_lora(
        velocity, pipeline.scheduler, latents, embeds, steps=args.max_train_steps, learning_rate=3e-3, batch_size=16
    )
    layers = {}
    for name, weights in lora.weights.items():
        for part, weight in zip("AB", weights, strict=True):
            layers[f"{name}.lora_{part}.weight"] = weight.detach()
    CogVideoXPipeline.save_lora_weights(args.output_dir, transformer_lora_layers=layers)


if __name__ == "__main__":
    main()
