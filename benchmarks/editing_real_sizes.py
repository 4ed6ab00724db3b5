"""Time of one edit at the sizes of SDXL and FLUX.2 klein (4B), with random weights.

python benchmarks/editing_real_sizes.py --models sdxl flux2_klein

The Linears that read text alone and the text are of the published sizes, so that all that an edit computes is; what
stands around them is small: no edit reads it, and text encoders are timed by `cost_of_statistics.py`.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.gpu.models import klein_tokenizer
from benchmarks.machine import table, write_results
from benchmarks.real_sizes import SDXL
from diffusers_ext.nullspace.edit import edit_concept
from examples.digits.prompts import make_tokenizer
from examples.digits.subjects import knowledge_prompts
from examples.digits.train_model import build_vae

BARS = {"sdxl": 60.0, "flux2_klein": 120.0}  # seconds, on 2 cores
# How many prompts are preserved, beside their sub-phrases: a prompt of FLUX.2 has 512 tokens, one of SDXL 77.
PRESERVED = {"sdxl": 200, "flux2_klein": 8}


def widened(linear: torch.nn.Linear, in_features: int, out_features: int) -> torch.nn.Sequential:
    """A Linear of a published size that gives as many features as a small one."""
    wide = torch.nn.Linear(in_features, out_features, bias=linear.bias is not None)
    return torch.nn.Sequential(wide, torch.nn.AdaptiveAvgPool1d(linear.out_features))


def sdxl() -> StableDiffusionXLPipeline:
    """70 cross-attention layers whose K and V read 2048 features, 20 of the 140 Linears 640 wide, the others 1280."""
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 77
    encoders = []
    for kind, width in ((CLIPTextModel, 768), (CLIPTextModelWithProjection, 1280)):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=1280,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        encoders.append(kind(config).eval())
    small = {"sample_size": 16, "block_out_channels": (32, 64, 128), "attention_head_dim": [1, 2, 4]}
    unet = UNet2DConditionModel(**{**SDXL, **small}).eval()
    for name, module in list(unet.named_modules()):
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            parent, _, leaf = name.rpartition(".")
            width = 10 * module.out_features
            setattr(unet.get_submodule(parent), leaf, widened(module, module.in_features, width))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionXLPipeline(
        build_vae().eval(), *encoders, tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    )


def flux2_klein() -> Flux2KleinPipeline:
    """A `context_embedder` of 7680 x 3072 features."""
    tokenizer = klein_tokenizer(knowledge_prompts())
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=2560,
            intermediate_size=64,
            num_hidden_layers=3,  # of 36, of which the family reads all three: 7680 features, side by side
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=512,
        )
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=7680,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()
    transformer.context_embedder = widened(transformer.context_embedder, 7680, 3072)
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, vae.eval(), encoder.eval(), tokenizer, transformer)


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {"sdxl": sdxl, "flux2_klein": flux2_klein}


def measure(name: str) -> dict[str, Any]:
    """Seconds of one edit, its Linears and its rank, and the peak of this process."""
    torch.manual_seed(0)
    pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    preserved = [prompt for prompt in knowledge_prompts() if "three" not in prompt][: PRESERVED[name]]
    began = time.perf_counter()
    cpu = time.process_time()
    found = edit_concept(pipeline, {"three": "nine"}, preserved, batch_size=32)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "bar_seconds": BARS[name],
        "linears": len(found.report.layers),
        "edited_prompts": found.report.edited_prompts,
        "preserved_prompts": found.report.preserved_prompts,
        "rank": max(row["rank"] for row in found.report.layers),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main(input_args: list[str] | None = None) -> None:
    """Measure the chosen models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    args = parser.parse_args(input_args)
    results = {name: measure(name) for name in args.models}
    rows = [
        [
            name,
            str(one["linears"]),
            f"{one['edited_prompts']} / {one['preserved_prompts']}",
            str(one["rank"]),
            f"{one['seconds']:.1f} s",
            f"{one['cpu_seconds']:.1f} s",
            f"{one['bar_seconds']:.0f} s",
            f"{one['peak_gib']:.1f} GiB",
        ]
        for name, one in results.items()
    ]
    header = ["model", "Linears", "prompts edited / preserved", "rank", "time", "CPU time", "bar", "peak"]
    text = table(header, rows)
    write_results("editing_real_sizes", results, text)
    print(text)


if __name__ == "__main__":
    main()
