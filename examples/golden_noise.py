"""Draw one prompt from random noise and from golden noise of the same seed, side by side.

python examples/golden_noise.py --pretrained_model_name_or_path examples/digits/model \
    --noise_model outputs/golden_noise_model --prompt "a photo of the red digit seven"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from diffusers_ext.golden_noise import pipeline, pipeline_transformers
from diffusers_ext.golden_noise.loading import load_noise_model


PIPELINES = {
    "StableDiffusionPipeline": pipeline.GoldenNoisePipeline,
    "StableDiffusionXLPipeline": pipeline.GoldenNoiseXLPipeline,
    "HunyuanDiTPipeline": pipeline_transformers.GoldenNoiseHunyuanDiTPipeline,
    "StableDiffusion3Pipeline": pipeline_transformers.GoldenNoiseSD3Pipeline,
    "FluxPipeline": pipeline_transformers.GoldenNoiseFluxPipeline,
}


def main(input_args: Sequence[str] | None = None) -> None:
    """Write the pair: random noise left, golden noise right."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("pretrained_model_name_or_path", "noise_model", "prompt"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--output", type=Path, default=Path("golden_noise.png"))
    args = parser.parse_args(input_args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source = args.pretrained_model_name_or_path
    pipeline_class = PIPELINES[DiffusionPipeline.load_config(source)["_class_name"]]
    noise_model = load_noise_model(args.noise_model)
    pipe = pipeline_class.from_pretrained(source, noise_model=noise_model, dtype=dtype).to(device)
    run = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale")}
    pixels = []
    for scale in (0.0, 1.0):
        run["generator"] = torch.Generator().manual_seed(args.seed)
        pixels += [*pipe(args.prompt, golden_noise_scale=scale, output_type="np", **run).images]
    pipe.image_processor.numpy_to_pil(np.concatenate(pixels, axis=1))[0].save(args.output)


if __name__ == "__main__":
    main()
