"""Draw pictures of a prompt from golden noise, and from the plain noise of the same seeds.

    python training/sample_golden_noise.py --pretrained_model_name_or_path examples/digits/model \\
        --noise_model outputs/golden_noise_model --prompt "a red nine" --seed 7 \\
        --generate_standard --num_inference_steps 6 --guidance_scale 1.5 --output_dir outputs/samples
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.core.settings import ModelSettings, SamplingSettings
from diffusers_ext.evaluation.golden_noise import NetworkRefiner
from diffusers_ext.evaluation.rendering import Sampling, Shot, draw_from_noise, latent_shape, to_images, unit_noise
from diffusers_ext.families import find_family
from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.redenoise import TOOL, encode_prompts
from diffusers_ext.training.golden_noise.settings import GoldenSampleSettings
from diffusers_ext.training.run.base_model import load_frozen
from diffusers_ext.training.run.script import check_output_dir, one_run_a_folder, staged_output
from diffusers_ext.training.run.settings import parse_settings
from diffusers_ext.training.run.setup import GOLDEN_NOISE_RUNS, WEIGHT_DTYPES, make_accelerator

logger = get_logger(__name__)


def load_base_pipeline(settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of `--pretrained_model_name_or_path`, frozen, in evaluation mode, unfiltered."""
    pipeline = load_frozen(settings, dtype)
    find_family(pipeline, TOOL)
    return pipeline.to(device)


def square_latent_shape(pipeline: DiffusionPipeline, output_size: int | None) -> tuple[int, int, int]:
    """As `latent_shape`, of square pictures; raises `ValueError` for a size that the model cannot draw."""
    if output_size is not None:
        family = find_family(pipeline, TOOL)
        unit = family.pixels_per_latent(pipeline) * family.patch(denoiser_of(pipeline).config)
        if output_size % unit:
            raise ValueError(
                f"`output_size` must be divisible by {unit} for this {type(pipeline).__name__}, got {output_size}."
            )
    return latent_shape(pipeline, output_size, output_size)


@torch.no_grad()
def render(
    pipeline: DiffusionPipeline,
    noise: torch.Tensor,
    text: TextConditioning,
    settings: SamplingSettings,
    seeds: Sequence[int],
) -> list[Image.Image]:
    """One picture per noise, in one call of the pipeline, which is left as it was.

    The noise is unit noise, `(batch, channels, height, width)`; `seeds` are for samplers that draw noise on their way.
    """
    family, denoiser = find_family(pipeline, TOOL), denoiser_of(pipeline)
    height, width = (int(size) * family.pixels_per_latent(pipeline) for size in noise.shape[-2:])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for generator in generators:  # past what the noise itself was drawn from
        torch.randn(noise.shape[1:], generator=generator)
    noise = noise.to(pipeline._execution_device, family.latents_dtype or denoiser.dtype)
    guidance = family.guidance_arguments(denoiser.config, settings.guidance_scale)
    guidance.pop("negative_prompt", None)  # which is in the text, encoded
    # A VAE takes far more memory for a large picture than the denoiser.
    with quiet_run(pipeline), decoded_one_by_one(pipeline.vae):
        images = pipeline(
            # Unit noise: pipelines scale it by `init_noise_sigma`, if at all, by themselves.
            latents=family.pack(pipeline, noise),
            height=height,
            width=width,
            num_inference_steps=settings.num_inference_steps,
            generator=generators,
            output_type="pt",
            **guidance,
            **family.text_arguments(text),
            **family.call_arguments,
        ).images
    if not torch.isfinite(images).all():
        raise ValueError(
            f"{type(pipeline).__name__} must draw finite pictures, got NaN or infinite pixels. Use "
            "float32 or bfloat16."
        )
    return pipeline.image_processor.numpy_to_pil(images.float().permute(0, 2, 3, 1).cpu().numpy())


@contextmanager
def decoded_one_by_one(vae: torch.nn.Module) -> Iterator[None]:
    """The VAE decodes each picture of a batch by itself; its own way comes back."""
    sliced = vae.use_slicing
    vae.enable_slicing()
    try:
        yield
    finally:
        vae.use_slicing = sliced


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
