"""Q and out statistics at the sizes of Stable Diffusion 1.5 and SDXL, with random weights.

python benchmarks/real_sizes.py --models sd15 sdxl
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from benchmarks.timing import seconds
from diffusers_ext.core.capture import capture
from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.nullspace.slots import find_linears

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
MODELS = {"sd15": SD15, "sdxl": SDXL}


def build(name: str, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet with cheap random weights: none of the figures depends on them."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**MODELS[name])
    unet = unet.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in unet.parameters():
        parameter.uniform_(-0.02, 0.02, generator=generator)
    return unet


def call_inputs(name: str, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of one forward call at the model's own resolution."""
    config = MODELS[name]
    size, width = config["sample_size"], config["cross_attention_dim"]
    inputs = {
        "sample": torch.randn(batch, 4, size, size, device=device, dtype=dtype),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": torch.randn(batch, 77, width, device=device, dtype=dtype),
    }
    if name == "sdxl":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 1280, device=device, dtype=dtype),
            "time_ids": torch.zeros(batch, 6, device=device, dtype=dtype),
        }
    return inputs


def measure(name: str, batch: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of one forward call, bare and with statistics, and what the statistics take."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    unet, inputs = build(name, device, dtype), call_inputs(name, batch, device, dtype)
    targets = find_linears(unet, ("q", "out"))
    moments = {key: SecondMoment(linear.in_features, device) for key, linear in targets.items()}

    def bare() -> None:
        with torch.no_grad():
            unet(**inputs)

    def counted() -> None:
        with torch.no_grad(), capture(unet, targets, lambda key, x: moments[key].update(x)):
            unet(**inputs)

    times = [(seconds(bare), seconds(counted)) for _ in range(repeats)]
    bare_seconds, counted_seconds = (min(column) for column in zip(*times, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {
        "batch": batch,
        "matrices": len(moments),
        "bare_seconds": bare_seconds,
        "counted_seconds": counted_seconds,
        "ratio": counted_seconds / bare_seconds,
        "statistics_mib": sum(moment.total.nbytes for moment in moments.values()) / 2**20,
        "peak_gib": peak / 2**30,
    }


def main(input_args: list[str] | None = None) -> None:
    """Measure the chosen models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["sd15", "sdxl"])
    parser.add_argument("--batch_size", type=int, default=2, help="2 is one prompt with guidance")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args(input_args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results, rows = {}, []
    for name in args.models:
        figures = measure(name, args.batch_size, device, args.repeats)
        gc.collect()
        results[name] = figures
        rows.append(
            [
                name,
                str(figures["matrices"]),
                f"{figures['bare_seconds']:.1f} s",
                f"{figures['counted_seconds']:.1f} s",
                f"{figures['ratio']:.3f}",
                f"{figures['statistics_mib']:.0f} MiB",
                f"{figures['peak_gib']:.1f} GiB",
            ]
        )
    header = ["UNet", "matrices", "forward", "with q/out statistics", "ratio", "statistics", "peak"]
    text = table(header, rows)
    write_results("real_sizes", results, text)
    print(text)


if __name__ == "__main__":
    main()
