"""Use an eraser and a LoRA on CogVideoX at once, each with its own strength.

python examples/combine_eraser_with_lora.py --lora user/style --eraser user/no-dog \
    --prompt "a dog runs along the beach" --eraser_strength 0.8
"""

from __future__ import annotations

import sys
from pathlib import Path

from diffusers import CogVideoXPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from diffusers_ext import load_eraser, render_clips
from diffusers_ext.evaluation.report_files import KeptClip, clip_sheet, write_clip
from examples.arguments import DEVICE, DTYPE, read_arguments


def main(input_args: list[str] | None = None) -> None:
    """Write clips of one seed and a sheet: neither, the LoRA, the eraser, both."""
    args = read_arguments(
        __doc__, input_args, model="THUDM/CogVideoX-2b", lora=str, eraser=str, prompt=str, seed=0,
        lora_strength=1.0, eraser_strength=1.0, num_inference_steps=50, guidance_scale=6.0,
        output_dir="outputs/combined",
    )  # fmt: skip
    pipe = CogVideoXPipeline.from_pretrained(args.model, dtype=DTYPE).to(DEVICE)
    pipe.load_lora_weights(args.lora, adapter_name="lora")
    load_eraser(pipe, args.eraser, adapter_name="eraser")  # in either order, and several of each
    strengths = {
        "neither": [0.0, 0.0],
        "LoRA": [args.lora_strength, 0.0],
        "eraser": [0.0, args.eraser_strength],
        "both": [args.lora_strength, args.eraser_strength],
    }
    run = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale")}
    clips = {}
    for side, weights in strengths.items():
        pipe.transformer.set_adapters(["lora", "eraser"], weights)
        [clips[side]] = render_clips(pipe, [args.prompt], seeds=[args.seed], **run)
        write_clip(clips[side], f"{args.output_dir}/{side}.gif")
    kept = KeptClip(f"seed {args.seed}", args.prompt, args.seed, clips, notes={})
    clip_sheet([kept]).save(f"{args.output_dir}/sheet.png")


if __name__ == "__main__":
    main()
