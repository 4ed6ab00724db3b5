"""Take a concept out of CogVideoX, and see clips of the same seeds without and with the eraser.

python examples/erase_a_concept.py --concept dog --prompts_file dogs.txt --others "a cat on a sofa" `dogs.txt` has a
prompt a line that names the concept. With `--eraser user/no-dog` nothing is trained. `--training="..."` takes further
options of training/train_cogvideox_eraser.py.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from diffusers import CogVideoXPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from diffusers_ext import load_eraser, render_clips
from diffusers_ext.evaluation.report_files import KeptClip, clip_sheet, write_clip
from diffusers_ext.nullspace.prompts import read_prompts_file
from diffusers_ext.training.eraser import run as train_cogvideox_eraser
from examples.arguments import DEVICE, DTYPE, read_arguments


def main(input_args: list[str] | None = None) -> None:
    """Write the eraser, clips of its first prompts and of others, and a sheet of their frames."""
    args = read_arguments(
        __doc__, input_args, model="THUDM/CogVideoX-2b", concept=str, prompts_file=str, others=(),
        eraser=None, scale=1.0, num_prompts=2, num_inference_steps=50, guidance_scale=6.0,
        training="--auto_preserved_concepts", output_dir="outputs/eraser",
    )  # fmt: skip
    if args.eraser is None:
        options = {
            "pretrained_model_name_or_path": args.model, "target_concept": args.concept,
            "anchor_concept": "auto", "prompts_file": args.prompts_file, "output_dir": args.output_dir,
            "mixed_precision": "bf16" if DEVICE == "cuda" else "no",
        }  # fmt: skip
        command = [f"--{name}={value}" for name, value in options.items()]
        command += ["--gradient_checkpointing", *shlex.split(args.training)]
        args.eraser = train_cogvideox_eraser.main(train_cogvideox_eraser.parse_args(command))
    pipe = CogVideoXPipeline.from_pretrained(args.model, dtype=DTYPE).to(DEVICE)
    prompts = [*read_prompts_file(args.prompts_file)[: args.num_prompts], *args.others]
    run = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale")}
    run["seeds"] = range(len(prompts))
    clips = {"base": render_clips(pipe, prompts, **run)}
    load_eraser(pipe, args.eraser, scale=args.scale)  # scale 0 is the base model, to the bit
    clips["erased"] = render_clips(pipe, prompts, **run)
    kept = []
    for seed, prompt in enumerate(prompts):
        shown = {side: drawn[seed] for side, drawn in clips.items()}
        kept.append(KeptClip(f"seed {seed}", prompt, seed, shown, {}))
        for side, clip in shown.items():
            write_clip(clip, f"{args.output_dir}/clips/{seed}_{side}.gif")
    clip_sheet(kept).save(f"{args.output_dir}/clips/sheet.png")


if __name__ == "__main__":
    main()
