"""Keep a LoRA that you have from changing what it was not asked for, without training. Take the strictest file that
still shows the subject, by the sheet. python examples/protect_a_lora.py --lora user/some-lora --prompt "a photo of sks
dog" \
    --knowledge_prompts knowledge.txt    (a prompt a line of what must stay)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoPipelineForText2Image
from huggingface_hub import hf_hub_download

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from diffusers_ext import collect_statistics, debleed_lora
from diffusers_ext.core.sources import LORA_WEIGHT_NAME as NAME
from diffusers_ext.evaluation.report_files import SheetRow, picture_sheet
from diffusers_ext.nullspace.prompts import read_prompts_file
from examples.arguments import DEVICE, DTYPE, read_arguments


def main(input_args: list[str] | None = None) -> None:
    """Write a LoRA per strictness and a sheet: without LoRA, with yours, with each protected one."""
    args = read_arguments(
        __doc__, input_args, model="stabilityai/stable-diffusion-xl-base-1.0", lora=str, prompt=str,
        knowledge_prompts=str, features=("k", "v"), strictness=("1", "10", "100"), seed=0,
        guidance_scale=5.0, num_inference_steps=30, output_dir="outputs/protected_lora",
    )  # fmt: skip
    pipe = AutoPipelineForText2Image.from_pretrained(args.model, dtype=DTYPE).to(DEVICE)
    knowledge = read_prompts_file(args.knowledge_prompts)
    # `k v` of cross-attention read text alone; for `q out attn1.k ...` denoising runs are measured too.
    statistics = collect_statistics(pipe, knowledge, features=args.features)
    lora = args.lora if Path(args.lora).exists() else hf_hub_download(args.lora, NAME)
    sides = {"no LoRA": None, "LoRA": lora}
    how = {"pipeline": pipe, "instance_prompts": [args.prompt], "uncovered": "keep"}
    for value in args.strictness:
        sides[f"strictness {value}"] = path = f"{args.output_dir}/strictness_{value}/{NAME}"
        debleed_lora(lora, statistics, strictness=float(value), output_path=path, **how)

    prompts, rows = [args.prompt, *knowledge[:: max(1, len(knowledge) // 6)]], {}
    run = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
    for weights in sides.values():
        if weights is not None:
            pipe.load_lora_weights(weights)  # what comes out is an ordinary LoRA
        for prompt in prompts:
            run["generator"] = torch.Generator().manual_seed(args.seed)
            rows.setdefault(prompt, []).extend(pipe(prompt, **run).images)
        pipe.unload_lora_weights()
    drift = lambda row: [f"{np.abs(np.float32(row[0]) - p).mean() / 255:.2f}" for p in row[1:]]
    table = [SheetRow(prompt, "moved " + " ".join(drift(row)), row) for prompt, row in rows.items()]
    picture_sheet(table, list(sides), len(sides)).save(f"{args.output_dir}/sheet.png")


if __name__ == "__main__":
    main()
