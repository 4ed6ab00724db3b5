"""What the options of a training step take on this machine, against the step without them.

python benchmarks/training_options.py

A LoRA of rank 8 beside the cross-attention of a UNet with random weights, of the structure of Stable Diffusion 1.5 and
narrower; and optimizers over the weights of such a LoRA and of the whole UNet. What only a GPU can
tell is named and not measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from benchmarks.timing import Ratio, compare
from diffusers_ext.core.settings import OPTIMIZERS, TrainingSettings
from diffusers_ext.training.run.optimizers import make_optimizer, set_memory_format

ONLY_ON_A_GPU = (
    "dataloader_pin_memory",
    "dataloader_num_workers beside a busy GPU",
    "adamw_8bit",
    "channels_last and compile_model on tensor cores",
)


def make_unet(widths: Sequence[int]) -> UNet2DConditionModel:
    """A UNet of Stable Diffusion's structure with a LoRA on keys and values of cross-attention."""
    torch.manual_seed(0)
    count = len(widths)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=tuple(widths),
        down_block_types=("CrossAttnDownBlock2D",) * (count - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (count - 1),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["attn2.to_k", "attn2.to_v"]))
    return unet


def step_of(unet: torch.nn.Module, size: int, batch: int) -> Callable[[], None]:
    """Forward and backward of a batch of latents `size` a side."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, size, size, generator=generator)
    text = torch.randn(batch, 77, 768, generator=generator)
    times = torch.full((batch,), 500)

    def step() -> None:
        unet(latents, times, text).sample.square().mean().backward()

    return step


def update_of(name: str, shapes: Sequence[tuple[int, ...]]) -> Callable[[], None]:
    """A step of an optimizer over weights of these shapes."""
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    rate = 1.0 if name == "prodigy" else 1e-3
    optimizer = make_optimizer(TrainingSettings(optimizer=name, learning_rate=rate), weights)
    if name == "schedule_free":
        optimizer.train()
    return optimizer.step


def measure_layout(settings: argparse.Namespace, clock: Callable[[], float]) -> Ratio:
    """The step with channels last against the one without."""
    usual, last = make_unet(settings.widths), make_unet(settings.widths)
    set_memory_format(TrainingSettings(channels_last=True), last)
    steps = [step_of(unet, settings.size, settings.batch) for unet in (last, usual)]
    return compare(*steps, settings.pairs, clock)


def measure_compiler(settings: argparse.Namespace, clock: Callable[[], float]) -> tuple[Ratio, float]:
    """The compiled step against the plain one, and how long the first call took on the wall."""
    usual, compiled = make_unet(settings.widths), make_unet(settings.widths)
    steps = [step_of(unet, settings.size, settings.batch) for unet in (torch.compile(compiled), usual)]
    began = time.perf_counter()
    steps[0]()
    first = time.perf_counter() - began
    return compare(*steps, settings.pairs, clock), first


def measure_optimizers(settings: argparse.Namespace, clock: Callable[[], float]) -> dict[str, dict[str, Ratio]]:
    """Steps of the optimizers at hand against AdamW's, over the LoRA and over the whole UNet."""
    unet = make_unet(settings.widths)
    shapes = {
        "LoRA": [tuple(p.shape) for p in unet.parameters() if p.requires_grad],
        "whole UNet": [tuple(p.shape) for n, p in unet.named_parameters() if "lora_" not in n],
    }
    found: dict[str, dict[str, Ratio]] = {}
    for name, (package, _) in OPTIMIZERS.items():
        if name in ("adamw", "adamw_8bit") or find_spec(package) is None:
            continue
        found[name] = {
            what: compare(update_of(name, each), update_of("adamw", each), settings.updates, clock)
            for what, each in shapes.items()
        }
    return found


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Sizes and repeats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[96, 160, 320, 320], help="of the UNet's blocks")
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7, help="steps of either kind")
    parser.add_argument("--updates", type=int, default=21, help="of either optimizer")
    parser.add_argument("--no_compiler", action="store_true", help="leave out what takes minutes to compile")
    return parser.parse_args(input_args)


def main(settings: argparse.Namespace) -> dict[str, Any]:
    """Measure and write the results; returns them."""
    torch.set_num_threads(1)
    clock = time.process_time  # other programs on the cores do not count
    rows = [("channels_last, forward and backward", measure_layout(settings, clock))]
    results: dict[str, Any] = {"settings": vars(settings), "not_measured": list(ONLY_ON_A_GPU)}
    if not settings.no_compiler:
        ratio, results["seconds_of_the_first_compiled_step"] = measure_compiler(settings, clock)
        rows.append(("compile_model, forward and backward, compiled before", ratio))
    for name, parts in measure_optimizers(settings, clock).items():
        rows += [(f"{name}, a step over the {what}", ratio) for what, ratio in parts.items()]
    results["ratios"] = {name: ratio._asdict() for name, ratio in rows}
    cells = [
        [name, f"{r.median:.2f}", f"{r.lowest:.2f} to {r.highest:.2f}", f"{1000 * r.first_seconds:.1f}"]
        for name, r in rows
    ]
    text = table(["option", "time, without it 1", "pairs", "ms of one core"], cells)
    if "seconds_of_the_first_compiled_step" in results:
        text += f"\n\nThe first compiled step took {results['seconds_of_the_first_compiled_step']:.0f} s."
    text += f"\n\nNot measured without a GPU: {', '.join(ONLY_ON_A_GPU)}."
    write_results("training_options", results, text)
    print(text)
    return results


if __name__ == "__main__":
    main(parse_args())
