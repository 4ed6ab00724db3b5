"""What cheaper Gram matrices along denoising runs cost on tensor cores, and by how much they turn the directions.

python benchmarks/precision_of_statistics.py
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from benchmarks.real_sizes import SDXL, call_inputs
from diffusers_ext.core.capture import capture
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.core.second_moment import gram, sampled_gram, split_gram
from diffusers_ext.nullspace.directions import generalized_directions
from diffusers_ext.nullspace.slots import find_linears
from diffusers_ext.planning.gpus import GPUS
from examples.digits.check_model import load_pipeline
from examples.digits.subjects import INSTANCE_PROMPTS, knowledge_prompts

FEATURES = ("q", "out")
SHARE, EPS = 0.03125, 1e-4


class Way(NamedTuple):
    """How a Gram matrix is computed, and of what."""

    name: str
    dtype: torch.dtype
    precision: str
    share: float = 1.0


WAYS = [
    Way("float32", torch.float32, "float32"),
    Way("bf16x3 of bfloat16 features", torch.bfloat16, "bf16x3"),
    Way("bf16x3 of float32 features", torch.float32, "bf16x3"),
    Way(f"float32, {SHARE:.3%} of the tokens", torch.float32, "float32", SHARE),
]


def counted_time(ways: Sequence[Way], gpu: str = "H100") -> dict[str, float]:
    """Time of SDXL's UNet with q/out statistics against that without, by counted operations at a GPU's peak rates.

    The forward call of two samples in bfloat16 runs on tensor cores; Gram matrices beside them or on them.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL).to(torch.bfloat16).eval()
    inputs = call_inputs("sdxl", 2, torch.device("meta"), torch.bfloat16)
    shapes: list[torch.Size] = []
    targets = find_linears(unet, FEATURES)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), capture(unet, targets, lambda _, x: shapes.append(x.flatten(0, -2).shape)):
        unet(**inputs)
    rates = next(one for one in GPUS if one.name == gpu)
    forward = counter.get_total_flops() / rates.half_tflops
    found = {}
    for way in ways:
        work = sum(count * _operations(way, math.ceil(way.share * n), d) for (n, d), count in Counter(shapes).items())
        rate = rates.half_tflops if way.precision == "bf16x3" else rates.float32_tflops
        found[way.name] = 1 + work / rate / forward
    return found


def _operations(way: Way, tokens: int, dim: int) -> int:
    """As the library multiplies, without data."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        gram(torch.empty(tokens, dim, dtype=way.dtype), precision=way.precision)
    return counter.get_total_flops()


def principal_angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest one between the spans of rows, in degrees; by its sine, which tells small ones."""
    a, b = (torch.linalg.qr(x.T).Q for x in (a, b))
    return math.degrees(math.asin(min(1.0, torch.linalg.matrix_norm(b - a @ (a.T @ b), 2).item())))


def turned_directions(prompts: Sequence[str], ranks: Sequence[int]) -> dict[str, dict[int, list[float]]]:
    """`{way: {rank: degrees}}` of all Linears' q and out of the digits model against float64."""
    pipeline = load_pipeline()
    targets = find_linears(pipeline.unet, FEATURES)
    instance = list(INSTANCE_PROMPTS.values())[:1] * 8
    old, new = (_inputs(pipeline, texts, targets) for texts in (prompts, instance))
    angles: dict[str, dict[int, list[float]]] = {}
    for name, rows in old.items():
        c_new = gram(new[name], torch.float64) / len(new[name])
        exact = gram(rows, torch.float64)
        grams = {
            "float32": gram(rows),
            "bf16x3 of float32 features": split_gram(rows),
            f"float32, {SHARE:.3%} of the tokens": sampled_gram(rows, SHARE, torch.Generator().manual_seed(0)).gram,
        }
        for rank in ranks:
            wanted = generalized_directions(c_new, exact / len(rows), rank, EPS).vectors
            for way, total in grams.items():
                found = generalized_directions(c_new, total.double() / len(rows), rank, EPS).vectors
                angles.setdefault(way, {}).setdefault(rank, []).append(principal_angle(wanted, found))
    return angles


def _inputs(pipeline, prompts: Sequence[str], targets: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """All tokens that the Linears read along runs of ten steps with guidance 3, `{name: (tokens, dim)}`."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in targets}
    seeds = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    with quiet_run(pipeline), capture(pipeline.unet, targets, lambda name, x: seen[name].append(x.flatten(0, -2))):
        pipeline(list(prompts), generator=seeds, output_type="latent", num_inference_steps=10, guidance_scale=3.0)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def main(input_args: list[str] | None = None) -> None:
    """Count, measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=48)
    args = parser.parse_args(input_args)
    torch.set_grad_enabled(False)
    counted = counted_time(WAYS)
    angles = turned_directions(knowledge_prompts()[: args.prompts], ranks := (1, 4))
    header = ["Gram matrices (q/out)", "ratio of time, SDXL on an H100, counted"]
    header += [f"principal angle, rank {rank}: median / largest, degrees" for rank in ranks]
    rows = []
    for way in WAYS:
        turned = angles.get(way.name)
        told = [f"{torch.tensor(turned[r]).median():.2g} / {max(turned[r]):.2g}" if turned else "" for r in ranks]
        rows.append([way.name, f"{counted[way.name]:.3f}", *told])
    text = table(header, rows)
    write_results("precision_of_statistics", {"counted_sdxl_h100": counted, "degrees": angles}, text)
    print(text)


if __name__ == "__main__":
    main()
