"""What GoldenNoiseModel costs in its SDXL configuration, whole and of low bands, next to the denoising it prepares.

python benchmarks/cost_of_golden_noise.py

The denoising is 50 steps with guidance, or 4 of a distilled model of SDXL's size without.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from benchmarks.real_sizes import SDXL, build, call_inputs
from benchmarks.timing import seconds
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel

# Of each run: steps, and samples of a step's call for one picture.
RUNS = {"50 steps with guidance": (50, 2), "4 steps of a distilled model": (4, 1)}
NETWORKS: dict[str, dict[str, int]] = {"whole": {}, "16 bands": {"bands": 16}}


def count_flops() -> dict[str, int]:
    """Operations of one golden-noise forward by each network and of one UNet call on one sample, from shapes alone."""
    counts, meta = {}, torch.device("meta")
    inputs = call_inputs("sdxl", 1, meta, torch.float32)
    for name, options in NETWORKS.items():
        with meta:
            network = GoldenNoiseModel(**options).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(inputs["sample"], inputs["encoder_hidden_states"])
        counts[name] = counter.get_total_flops()
    with meta:
        unet = UNet2DConditionModel(**SDXL).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**inputs)
    return {**counts, "unet": counter.get_total_flops()}


def measure(device: torch.device, repeats: int) -> dict[str, Any]:
    """Operations and seconds; the UNet's with guidance's batch of two on a GPU and of one on a CPU."""
    flops, found = count_flops(), {"networks": {}, "runs": {}}
    noise, text = torch.randn(1, 4, 128, 128, device=device), torch.randn(1, 77, 2048, device=device)
    for name, options in NETWORKS.items():
        network = GoldenNoiseModel(**options).to(device).eval()
        network.refine(noise, text)  # warm
        found["networks"][name] = {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "flops": flops[name],
            "seconds": min(seconds(partial(network.refine, noise, text)) for _ in range(5)),
        }
    dtype, samples = (torch.bfloat16, 2) if device.type == "cuda" else (torch.float32, 1)
    unet, inputs = build("sdxl", device, dtype), call_inputs("sdxl", samples, device, dtype)

    @torch.no_grad()
    def denoise() -> None:
        unet(**inputs)

    call_seconds = min(seconds(denoise) for _ in range(repeats))
    found["unet_call"] = {"seconds": call_seconds, "samples": samples, "flops": flops["unet"] * samples}
    for name, (steps, each) in RUNS.items():
        run = {"flops": flops["unet"] * steps * each, "seconds": call_seconds * steps * each / samples}
        for kind, network in found["networks"].items():
            run[kind] = {key: network[key] / run[key] for key in ("flops", "seconds")}
        found["runs"][name] = run
    return found


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """Networks, runs, and the share of each run that each network takes."""
    rows = [
        [f"GoldenNoiseModel, {name}", f"{x['flops'] / 1e12:.4f}", f"{x['seconds']:.2f} s"]
        for name, x in found["networks"].items()
    ]
    for name, run in found["runs"].items():
        rows.append([f"SDXL's UNet, {name}", f"{run['flops'] / 1e12:.0f}", f"{run['seconds']:.0f} s (from one call)"])
        for kind in found["networks"]:
            shares = (run[kind][key] for key in ("flops", "seconds"))
            rows.append([f"{kind} network / {name}", *(f"{share:.3%} (1/{1 / share:.0f})" for share in shares)])
    return rows


def operations_of(flops: dict[str, int]) -> tuple[dict[str, Any], str]:
    """Counts, and the share of each run that each network takes, as a table."""
    rows = [[f"GoldenNoiseModel, {kind}", f"{flops[kind] / 1e12:.4f}", *[""] * len(NETWORKS)] for kind in NETWORKS]
    shares: dict[str, Any] = {}
    for name, (steps, each) in RUNS.items():
        total = flops["unet"] * steps * each
        shares[name] = {kind: flops[kind] / total for kind in NETWORKS}
        cells = (f"{share:.4%} (1/{1 / share:.0f})" for share in shares[name].values())
        rows.append([f"SDXL's UNet, {name}", f"{total / 1e12:.0f}", *cells])
    header = ["one 1024 x 1024 picture", "TFLOPs", *(f"share of the network, {kind}" for kind in NETWORKS)]
    return {"flops": flops, "shares": shares}, table(header, rows)


def main(input_args: list[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--operations", action="store_true", help="count operations alone, from shapes")
    args = parser.parse_args(input_args)
    if args.operations:
        counted, text = operations_of(count_flops())
        write_results("operations_of_golden_noise", counted, text)
        print(text)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(device, args.repeats)
    text = table(["one 1024 x 1024 picture", "TFLOPs", "time"], rows_of(found))
    write_results("cost_of_golden_noise", found, text)
    print(text)


if __name__ == "__main__":
    main()
