"""What GoldenNoiseModel costs in its SDXL configuration, next to the denoising it prepares.

python benchmarks/cost_of_golden_noise.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from benchmarks.real_sizes import SDXL, build, call_inputs
from benchmarks.timing import seconds
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel

STEPS = 50  # with guidance, each is two samples through the UNet


def count_flops() -> dict[str, int]:
    """Operations of one golden-noise forward and of one UNet call on one sample, from shapes alone."""
    meta, dtype = torch.device("meta"), torch.float32
    inputs = call_inputs("sdxl", 1, meta, dtype)
    with meta:
        network, unet = GoldenNoiseModel().eval(), UNet2DConditionModel(**SDXL).eval()
    counts = {}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(inputs["sample"], inputs["encoder_hidden_states"])
    counts["network"] = counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**inputs)
    counts["unet"] = counter.get_total_flops()
    return counts


def measure(device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of both, the UNet with guidance's batch of two on a GPU and of one on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    flops = count_flops()
    network = GoldenNoiseModel().to(device).eval()
    unet, samples = build("sdxl", device, dtype), 2 if device.type == "cuda" else 1
    inputs = call_inputs("sdxl", samples, device, dtype)
    noise = torch.randn(1, 4, 128, 128, device=device)
    text = torch.randn(1, 77, 2048, device=device)

    def denoise() -> None:
        with torch.no_grad():
            unet(**inputs)

    network.refine(noise, text)  # warm
    network_seconds = min(seconds(lambda: network.refine(noise, text)) for _ in range(5))
    call_seconds = min(seconds(denoise) for _ in range(repeats))
    run_seconds = call_seconds * STEPS * 2 / samples
    run_flops = flops["unet"] * STEPS * 2
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "network_flops": flops["network"],
        "run_flops": run_flops,
        "flops_ratio": run_flops / flops["network"],
        "network_seconds": network_seconds,
        "unet_call_seconds": call_seconds,
        "unet_call_samples": samples,
        "run_seconds": run_seconds,
        "time_ratio": run_seconds / network_seconds,
    }


def main(input_args: list[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args(input_args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(device, args.repeats)
    rows = [
        ["GoldenNoiseModel, SDXL configuration", f"{found['network_flops'] / 1e12:.3f}",
         f"{found['network_seconds']:.2f} s"],
        [f"SDXL's UNet, {STEPS} steps with guidance", f"{found['run_flops'] / 1e12:.0f}",
         f"{found['run_seconds']:.0f} s (from one call)"],
        ["ratio", f"1/{found['flops_ratio']:.0f}", f"1/{found['time_ratio']:.0f}"],
    ]  # fmt: skip
    text = table(["one 1024 x 1024 picture", "TFLOPs", "time"], rows)
    write_results("cost_of_golden_noise", found, text)
    print(text)


if __name__ == "__main__":
    main()
