"""What statistics and null-space training cost beside the bare work, and the memory they take.

python benchmarks/cost_of_statistics.py
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from torch.utils.data import TensorDataset
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from benchmarks.timing import Ratio, compare
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.core.seeds import step_generator, training_schedule
from diffusers_ext.nullspace.collect import collect_statistics, encode_text, text_moment
from diffusers_ext.nullspace.lora import add_null_space_lora
from diffusers_ext.nullspace.slots import find_linears
from diffusers_ext.nullspace.step import DreamBoothLoss
from diffusers_ext.training.nullspace.data import encode_condition
from examples.digits.check_model import load_pipeline
from examples.digits.prompts import make_tokenizer
from examples.digits.subjects import INSTANCE_PROMPTS, knowledge_prompts

FEATURES = ("q", "out")


def clip_large(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The digits pipeline with a text encoder of Stable Diffusion 1.5's size, random weights."""
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    parts = {**pipeline.components, "text_encoder": CLIPTextModel(config), "tokenizer": tokenizer}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def text_cost(pipeline: StableDiffusionPipeline, prompts: list[str], pairs: int) -> Ratio:
    """K and V statistics against the text encoder alone over the same batches."""

    def encode() -> None:
        for start in range(0, len(prompts), 64):
            encode_text(pipeline, prompts[start : start + 64])

    return compare(lambda: text_moment(pipeline, prompts, batch_size=64), encode, pairs)


def trajectory_cost(pipeline: StableDiffusionPipeline, prompts: list[str], pairs: int) -> Ratio:
    """Q and out statistics against the bare denoising runs they are read from."""
    run = {"num_inference_steps": 10, "guidance_scale": 3.0}
    size = 8
    asked = ["", *prompts][: len(prompts)]

    def denoise() -> None:
        with quiet_run(pipeline):
            for start in range(0, len(asked), size):
                batch = asked[start : start + size]
                seeds = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
                pipeline(batch, negative_prompt=[""] * len(batch), generator=seeds, output_type="latent", **run)

    def collect() -> None:
        collect_statistics(pipeline, asked[1:], features=FEATURES, batch_size=size, show_progress=False, **run)

    return compare(collect, denoise, pairs)


def training_steps(null_space: bool, batch_size: int = 8) -> Callable[[], None]:
    """A function that makes ten training steps of rank 8, plain or null-space."""
    pipeline = load_pipeline()
    pipeline.unet.requires_grad_(False)
    prompt = next(iter(INSTANCE_PROMPTS.values()))
    if null_space:
        statistics = collect_statistics(pipeline, knowledge_prompts())
        add_null_space_lora(pipeline.unet, statistics, instance_prompts=[prompt], pipeline=pipeline, rank=8)
    else:
        targets = set(find_linears(pipeline.unet, ("k", "v")))
        pipeline.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=targets))
    trained = [p for p in pipeline.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    latents = TensorDataset(torch.randn(batch_size, 4, 8, 8), torch.rand(batch_size, 4, 8, 8))
    scheduler = training_schedule(pipeline.scheduler)
    loss = DreamBoothLoss(scheduler, encode_condition(pipeline, prompt))
    pipeline.unet.train()

    def steps() -> None:
        for index in range(10):
            batch = list(latents[:])
            loss(pipeline.unet, batch, step_generator(0, index))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def peak_memory(count: int) -> float:
    """Peak resident memory in MiB of a fresh process that reads Q and out for `count` prompts."""
    command = [sys.executable, __file__, "--memory_of", str(count)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])["peak_mib"]


def print_peak_memory(count: int) -> None:
    """Collect for `count` prompts in this process and print its peak memory as JSON."""
    collect_statistics(
        load_pipeline(),
        knowledge_prompts()[:count],
        features=FEATURES,
        num_inference_steps=2,
        batch_size=4,
        show_progress=False,
    )
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))
    print(json.dumps({"peak_mib": peak / 1024}))


def main(input_args: list[str] | None = None) -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--memory_of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(input_args)
    if args.memory_of:
        print_peak_memory(args.memory_of)
        return
    pipeline, prompts = load_pipeline(), knowledge_prompts()
    ratios = {
        "k/v statistics / text encoder (SD 1.5 size)": (
            text_cost(clip_large(pipeline), prompts[:64], max(3, args.pairs // 3)),
            1.05,
        ),
        "k/v statistics / text encoder (digits)": (
            text_cost(pipeline, prompts, 8 * args.pairs),  # a tenth of a second each
            1.05,
        ),
        "q/out statistics / denoising run (digits)": (trajectory_cost(pipeline, prompts[:16], args.pairs), 1.10),
        "null-space step / plain LoRA step (digits, rank 8)": (
            compare(training_steps(True), training_steps(False), 2 * args.pairs),
            1.03,
        ),
    }
    memory = {count: peak_memory(count) for count in (8, 64, 200)}
    rows = [
        [name, f"{r.median:.3f}", f"{r.lowest:.3f} to {r.highest:.3f}", f"{limit:.2f}"]
        for name, (r, limit) in ratios.items()
    ]
    text = table(["ratio of time", "median", "range", "limit"], rows)
    sizes = table(
        ["prompts (q/out)", *map(str, memory)], [["peak memory, MiB", *(f"{peak:.0f}" for peak in memory.values())]]
    )
    results = {
        "ratios": {name: {**r._asdict(), "limit": limit} for name, (r, limit) in ratios.items()},
        "peak_memory_mib": memory,
    }
    write_results("cost_of_statistics", results, f"{text}\n\n{sizes}")
    print(f"{text}\n\n{sizes}")


if __name__ == "__main__":
    main()
