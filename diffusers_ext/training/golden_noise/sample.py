"""Draw pictures of a prompt from golden noise, and from the plain noise of the same seeds.

    python training/sample_golden_noise.py --pretrained_model_name_or_path examples/digits/model \\
        --noise_model outputs/golden_noise_model --prompt "a red nine" --seed 7 \\
        --generate_standard --num_inference_steps 6 --guidance_scale 1.5 --output_dir outputs/samples
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate.logging import get_logger

from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.evaluation.golden_noise import NetworkRefiner
from diffusers_ext.evaluation.rendering import Sampling, Shot, draw_from_noise, latent_shape, to_images, unit_noise
from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.redenoise import encode_prompts
from diffusers_ext.golden_noise.settings import GoldenSampleSettings
from diffusers_ext.training.golden_noise.rendering import load_base_pipeline
from diffusers_ext.training.run.script import check_output_dir, one_run_a_folder, run_script, staged_output
from diffusers_ext.training.run.settings import parse_settings
from diffusers_ext.training.run.setup import GOLDEN_NOISE_RUNS, WEIGHT_DTYPES, make_accelerator

logger = get_logger(__name__)


def parse_args(input_args: Sequence[str] | None = None) -> GoldenSampleSettings:
    """Command line of this script, over the YAML file of `--config`."""
    return parse_settings(GoldenSampleSettings, __doc__, input_args, shared=GOLDEN_NOISE_RUNS)


@one_run_a_folder
def main(settings: GoldenSampleSettings) -> list[Path]:
    """Draw and write one file a picture; returns their paths."""
    check_output_dir(settings)
    accelerator = make_accelerator(settings)
    pipeline = load_base_pipeline(settings, accelerator.device, WEIGHT_DTYPES[settings.mixed_precision])
    refine = NetworkRefiner(load_noise_model(settings.noise_model).to(pipeline.device), settings.golden_noise_scale)
    height, width = settings.height or settings.output_size, settings.width or settings.output_size
    shape = latent_shape(pipeline, height, width)
    negative = settings.negative_prompt or None
    sampling = Sampling(settings.num_inference_steps, settings.guidance_scale, negative, height, width)
    names: list[str] = []
    with staged_output(settings.output_dir) as folder, quiet_run(pipeline):
        text = encode_prompts(pipeline, [settings.prompt], negative)
        for index in range(settings.num_images_per_prompt):
            shot = Shot(settings.prompt, index, settings.seed + index)
            noise = unit_noise([shot], shape).to(pipeline.device)
            sides = {"golden": refine(noise, text)}
            if settings.generate_standard:
                sides["standard"] = noise
            for side, start in sides.items():
                image = to_images(draw_from_noise(pipeline, [shot], sampling, start))[0]
                names.append(f"seed_{shot.seed}_{side}.png")
                image.save(folder / names[-1])
    written = [Path(settings.output_dir, name) for name in names]
    logger.info(f"Wrote {', '.join(map(str, written))}")
    return written


if __name__ == "__main__":
    run_script(parse_args, main, GoldenSampleSettings)
