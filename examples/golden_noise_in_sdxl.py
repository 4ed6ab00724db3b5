"""Draw a prompt from random noise and from golden noise of the same seeds, side by side.

python examples/golden_noise_in_sdxl.py --noise_model user/network --prompt "a red fox in the snow"

A published NPNet works as well, `--noise_model sdxl.pth`; other base models by `--model`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import diffusers_ext
from diffusers_ext import NPNet, load_noise_model
from diffusers_ext.evaluation.report_files import SheetRow, picture_sheet
from diffusers_ext.families import FAMILIES
from examples.arguments import DEVICE, DTYPE, read_arguments

PIPELINES = {
    family.pipelines[0]: getattr(diffusers_ext, family.golden_pipeline)
    for family in FAMILIES
    if family.golden_pipeline is not None
}


def main(input_args: list[str] | None = None) -> None:
    """Write a sheet with a row per seed: random noise left, golden noise right."""
    args = read_arguments(
        __doc__, input_args, model="stabilityai/stable-diffusion-xl-base-1.0", noise_model=str,
        prompt=str, seeds=("0", "1", "2", "3"), golden_noise_scale=1.0, num_inference_steps=30,
        guidance_scale=5.5, output="outputs/golden_noise.png",
    )  # fmt: skip
    is_npnet = args.noise_model.endswith((".pth", ".safetensors"))
    noise_model = (NPNet.from_single_file if is_npnet else load_noise_model)(args.noise_model)
    pipeline_class = PIPELINES[DiffusionPipeline.load_config(args.model)["_class_name"]]
    # The network is one more component: `save_pretrained` and `push_to_hub` include it.
    pipe = pipeline_class.from_pretrained(args.model, noise_model=noise_model, dtype=DTYPE)
    pipe.to(DEVICE)
    run = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale")}
    rows = []
    for seed in args.seeds:
        pictures = []
        for scale in (0.0, args.golden_noise_scale):  # 0 is the plain pipeline, to the bit
            run["generator"] = torch.Generator().manual_seed(int(seed))
            pictures += pipe(args.prompt, golden_noise_scale=scale, **run).images
        rows.append(SheetRow(args.prompt, f"seed {seed}", pictures))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    picture_sheet(rows, ["random noise", "golden noise"]).save(args.output)


if __name__ == "__main__":
    main()
