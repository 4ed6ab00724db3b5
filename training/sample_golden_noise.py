"""Draw pictures of a prompt from golden noise, and from the plain noise of the same seeds.

    python training/sample_golden_noise.py --pretrained_model_name_or_path examples/digits/model \\
        --noise_model outputs/golden_noise_model --prompt "a red nine" --seed 7 \\
        --generate_standard --num_inference_steps 6 --guidance_scale 1.5 --output_dir outputs/samples
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate.logging import get_logger


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.command_line.argument_parser import OneLineParser
from diffusers_ext.core.quiet_run import quiet_run
from diffusers_ext.evaluation.golden_noise_subjects import NetworkRefiner
from diffusers_ext.evaluation.noise_rendering import draw_from_noise, latent_shape, unit_noise
from diffusers_ext.evaluation.rendering import Sampling, Shot, to_images
from diffusers_ext.golden_noise.conditioning import encode_prompts
from diffusers_ext.golden_noise.loading import load_noise_model
from training.argument_rules import check_values
from training.arguments import add_model_arguments, add_sampling_arguments
from training.config_file import parse_arguments
from training.golden_noise_arguments import PAIR_GROUPS, SEQUENCE_GROUPS, read_aliases
from training.output_folder import check_output_dir, one_run_a_folder, staged_output
from training.pair_arguments import add_filter_arguments, add_pair_arguments
from training.pair_rendering import load_base_pipeline
from training.run_setup import WEIGHT_DTYPES, make_accelerator
from training.script_entry import run_script


logger = get_logger(__name__)


def add_golden_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Which network, which prompt and how many pictures."""
    group = parser.add_argument_group("golden noise")
    group.add_argument(
        "--base_model_id",
        dest="pretrained_model_name_or_path",
        help="the same as --pretrained_model_name_or_path",
    )
    group.add_argument(
        "--noise_model",
        "--npnet_weights_path",
        help="folder, Hub name, or NPNet's single file (.pth or .safetensors)",
    )
    group.add_argument("--prompt", help="what to draw")
    group.add_argument("--num_images_per_prompt", type=int, default=1, help="seeds from --seed on")
    group.add_argument(
        "--generate_standard", action="store_true", help="also from the plain noise of each seed"
    )
    group.add_argument("--golden_noise_scale", type=float, default=1.0, help="of the network")
    group.add_argument("--output_size", type=int, help="pixels a side; the model's own without it")
    group.add_argument("--height", type=int, help="--output_size without it")
    group.add_argument("--width", type=int, help="--output_size without it")


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this script, over the YAML file of `--config`."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for add_arguments in (
        add_model_arguments,
        add_sampling_arguments,
        add_golden_sampling_arguments,
    ):
        add_arguments(parser)
    return parse_arguments(
        parser,
        input_args,
        ("pretrained_model_name_or_path", "noise_model", "prompt", "output_dir"),
        read_aliases,
        (*PAIR_GROUPS, *SEQUENCE_GROUPS, add_pair_arguments, add_filter_arguments),
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` for what is wrong without looking at any model."""
    check_values(args, ["output_dir"], "a folder", lambda value: not Path(value).is_file())
    counts = ("num_inference_steps", "num_images_per_prompt", "output_size", "height", "width")
    check_values(args, counts, "at least 1", lambda value: value >= 1)
    check_values(args, ["guidance_scale", "golden_noise_scale"], "a finite number", math.isfinite)
    check_values(args, ["seed"], "from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)


@one_run_a_folder
def main(args: argparse.Namespace) -> list[Path]:
    """Draw and write one file a picture; returns their paths."""
    check_arguments(args)
    check_output_dir(args)
    accelerator = make_accelerator(args)
    pipeline = load_base_pipeline(args, accelerator.device, WEIGHT_DTYPES[args.mixed_precision])
    refine = NetworkRefiner(
        load_noise_model(args.noise_model).to(pipeline.device), args.golden_noise_scale
    )
    height, width = args.height or args.output_size, args.width or args.output_size
    shape = latent_shape(pipeline, height, width)
    negative = args.negative_prompt or None
    sampling = Sampling(args.num_inference_steps, args.guidance_scale, negative, height, width)
    names: list[str] = []
    with staged_output(args.output_dir) as folder, quiet_run(pipeline):
        text = encode_prompts(pipeline, [args.prompt], negative)
        for index in range(args.num_images_per_prompt):
            shot = Shot(args.prompt, index, args.seed + index)
            noise = unit_noise([shot], shape).to(pipeline.device)
            sides = {"golden": refine(noise, text)}
            if args.generate_standard:
                sides["standard"] = noise
            for side, start in sides.items():
                image = to_images(draw_from_noise(pipeline, [shot], sampling, start))[0]
                names.append(f"seed_{shot.seed}_{side}.png")
                image.save(folder / names[-1])
    written = [Path(args.output_dir, name) for name in names]
    logger.info(f"Wrote {', '.join(map(str, written))}")
    return written


if __name__ == "__main__":
    run_script(parse_args, main)
