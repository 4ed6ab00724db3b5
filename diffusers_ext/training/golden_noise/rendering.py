"""The base pipeline of a pair generation: loading it, and pictures from given unit noise."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.core.settings import ModelSettings, SamplingSettings
from diffusers_ext.core.text_files import read_prompt_texts
from diffusers_ext.evaluation import rendering
from diffusers_ext.families.registry import find_family
from diffusers_ext.families.text_conditioning import TextConditioning
from diffusers_ext.golden_noise.redenoise import TOOL, denoiser_of
from diffusers_ext.training.run.base_model import load_frozen


def read_prompt_file(path: str | os.PathLike, column: str = "prompt") -> list[str]:
    """Prompts of a text file, one a line, or of a column of a table.

    There are no comments and no missing values: `# 1`, `None`, `NA` and `null` are prompts. Only blank lines are
    passed over.

    Args:
        path: a name that ends in `.csv`, `.tsv`, `.json`, `.jsonl` or `.parquet` is read as a table, one that ends in
            `.txt` or has no ending as text.
        column: of a table.

    Raises:
        ValueError: no such file or column, another format, a broken row, or no prompt.
    """
    return read_prompt_texts(path, column, argument="prompt_file")


def load_base_pipeline(settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of `--pretrained_model_name_or_path`, frozen, in evaluation mode, unfiltered.

    Raises:
        ValueError: no pipeline, or one of a family that golden noise is not known for.
    """
    pipeline = load_frozen(settings, dtype)
    find_family(pipeline, TOOL)
    return pipeline.to(device)


def latent_shape(pipeline: DiffusionPipeline, output_size: int | None) -> tuple[int, int, int]:
    """`(channels, height, width)` of the latents of square pictures, unpacked also for Flux.

    Args:
        pipeline: of a family that golden noise is known for.
        output_size: pixels of a side; the size that the pipeline draws by itself when `None`.

    Raises:
        ValueError: a size that the model cannot draw.
    """
    if output_size is not None:
        patch = find_family(pipeline, TOOL).patch(denoiser_of(pipeline).config)
        unit = pipeline.vae_scale_factor * patch
        if output_size % unit:
            raise ValueError(
                f"`output_size` must be divisible by {unit} for this {type(pipeline).__name__}, got {output_size}."
            )
    return rendering.latent_shape(pipeline, output_size, output_size)


@torch.no_grad()
def render(
    pipeline: DiffusionPipeline,
    noise: torch.Tensor,
    text: TextConditioning,
    settings: SamplingSettings,
    seeds: Sequence[int],
) -> list[Image.Image]:
    """One picture per noise, in one call of the pipeline, which is left as it was.

    Args:
        pipeline: Stable Diffusion, SDXL, Hunyuan-DiT, SD3 or Flux.
        noise: `(batch, channels, height, width)`, unit noise.
        text: the prompts, one a noise.
        settings: steps and guidance.
        seeds: one a noise, for samplers that draw noise on their way.

    Raises:
        ValueError: a picture is not finite.
    """
    height, width = (int(size) * pipeline.vae_scale_factor for size in noise.shape[-2:])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for generator in generators:  # past what the noise itself was drawn from
        torch.randn(noise.shape[1:], generator=generator)
    family = find_family(pipeline, TOOL)
    noise = noise.to(pipeline._execution_device, denoiser_of(pipeline).dtype)
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
            guidance_scale=settings.guidance_scale,
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
