"""Draw pictures of a prompt from golden noise, and from the plain noise of the same seeds.

    python training/sample_golden_noise.py --pretrained_model_name_or_path examples/digits/model \\
        --noise_model outputs/golden_noise_model --prompt "a red nine" --seed 7 \\
        --generate_standard --num_inference_steps 6 --guidance_scale 1.5 --output_dir outputs/samples
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

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
    images = _draw(pipeline, type(pipeline).__call__, noise, text, settings, seeds)
    return pipeline.image_processor.numpy_to_pil(images.float().permute(0, 2, 3, 1).cpu().numpy())


def draw_with_gradient(
    pipeline: DiffusionPipeline,
    noise: torch.Tensor,
    text: TextConditioning,
    settings: SamplingSettings,
    seeds: Sequence[int],
    gradient_steps: int | None = None,
) -> torch.Tensor:
    """What `render` draws, `(batch, 3, height, width)` in [0, 1] on the pipeline's device, with a gradient to `noise`.

    Args:
        gradient_steps: of the last denoising steps it goes through the denoiser, of earlier ones only through what
            the sampler adds the denoiser's output to; through all when `None`.
    """
    call = getattr(type(pipeline).__call__, "__wrapped__", None)  # without `torch.no_grad`
    if call is None:
        raise ValueError(
            f"`pipeline` must be one of diffusers, whose call can be made with a gradient, got {type(pipeline)}."
        )
    without = 0 if gradient_steps is None else max(0, settings.num_inference_steps - gradient_steps)
    with _detached_steps(pipeline, without) as further:
        return _draw(pipeline, call, noise, text, settings, seeds, **further)


def _draw(
    pipeline: DiffusionPipeline,
    call: Callable[..., Any],
    noise: torch.Tensor,
    text: TextConditioning,
    settings: SamplingSettings,
    seeds: Sequence[int],
    **further: Any,
) -> torch.Tensor:
    family, denoiser = find_family(pipeline, TOOL), denoiser_of(pipeline)
    height, width = (int(size) * family.pixels_per_latent(pipeline) for size in noise.shape[-2:])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for generator in generators:  # past what the noise itself was drawn from
        torch.randn(noise.shape[1:], generator=generator)
    noise = noise.to(pipeline._execution_device, family.latents_dtype or denoiser.dtype)
    guidance = family.guidance_arguments(denoiser.config, settings.guidance_scale)
    guidance.pop("negative_prompt", None)  # which is in the text, encoded
    # A VAE takes far more memory for a large picture than the denoiser; a gradient keeps that of all pictures anyway.
    decoding = nullcontext() if noise.requires_grad else decoded_one_by_one(pipeline.vae)
    with quiet_run(pipeline), decoding:
        images = call(
            pipeline,
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
            **further,
        ).images
    if not torch.isfinite(images).all():
        raise ValueError(
            f"{type(pipeline).__name__} must draw finite pictures, got NaN or infinite pixels. Use "
            "float32 or bfloat16."
        )
    return images


@contextmanager
def _detached_steps(pipeline: DiffusionPipeline, count: int) -> Iterator[dict[str, Any]]:
    """Cut the gradient of the denoiser's output in the first `count` steps; gives further arguments of the call."""
    done = 0

    def count_step(pipe: DiffusionPipeline, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done = step + 1
        return kept

    def detach(module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(part.detach() for part in output) if done < count else output

    if not count:
        yield {}
        return
    hook = denoiser_of(pipeline).register_forward_hook(detach)
    try:
        yield {"callback_on_step_end": count_step}
    finally:
        hook.remove()


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
    network = load_noise_model(settings.noise_model).to(pipeline.device)
    refine = NetworkRefiner(network, settings.golden_noise_scale, pipeline)
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
