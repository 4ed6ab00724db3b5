"""Draw many prompts from random and from golden noise of the same seeds and score them in a table.

python examples/prompts_with_table.py --noise_model user/network --prompt_file prompts.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from diffusers_ext.evaluation.judges import load_reward
from diffusers_ext.evaluation.paired_comparison import compare_pairs
from diffusers_ext.evaluation.report_files import write_rows, write_text
from diffusers_ext.nullspace.prompts import read_prompts_file
from examples.arguments import DEVICE, DTYPE, read_arguments
from examples.golden_noise_in_sdxl import PIPELINES


def main(input_args: list[str] | None = None) -> None:
    """Write all pictures, their scores, and a table: means, wins and 95 % intervals."""
    args = read_arguments(
        __doc__, input_args, model="stabilityai/stable-diffusion-xl-base-1.0", noise_model=str,
        prompt_file=str, reward="hpsv2", num_inference_steps=30, guidance_scale=5.5,
        output_dir="outputs/prompts",
    )  # fmt: skip
    pipeline_class = PIPELINES[DiffusionPipeline.load_config(args.model)["_class_name"]]
    pipe = pipeline_class.from_pretrained(args.model, dtype=DTYPE).to(DEVICE)
    pipe.load_noise_model(args.noise_model)
    reward = load_reward(args.reward, device=DEVICE)  # or pickscore, clip_score, module:Class
    run = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale")}
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    rows = []
    for seed, prompt in enumerate(read_prompts_file(args.prompt_file)):
        rows.append({"prompt": prompt, "seed": seed})
        for side, scale in {"random": 0.0, "golden": 1.0}.items():
            run["generator"] = torch.Generator().manual_seed(seed)
            [picture] = pipe(prompt, golden_noise_scale=scale, **run).images
            picture.save(f"{args.output_dir}/{seed:04d}_{side}.png")
            rows[-1][side] = reward.score([picture], [prompt]).item()
    scores = [torch.tensor([row[side] for row in rows]) for side in ("random", "golden")]
    found = compare_pairs(*scores)._asdict()
    table = (
        f"| {reward.name}, {len(rows)} prompts | random noise | golden noise | 95 % interval |\n|---|---|---|---|\n"
        "| mean | {mean_standard:.4f} | {mean_other:.4f} | "
        "{difference_interval[0]:+.4f} to {difference_interval[1]:+.4f} |\n"
        "| wins | | {win_rate:.2f} | {win_rate_interval[0]:.2f} to {win_rate_interval[1]:.2f} |\n"
    ).format(**found)
    write_rows(f"{args.output_dir}/scores.csv", rows)
    write_text(f"{args.output_dir}/table.md", table)
    print(table)


if __name__ == "__main__":
    main()
