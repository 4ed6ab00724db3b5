"""DreamBooth's pictures and prompts for Stable Diffusion and SDXL: read, encoded once, drawn."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.pictures import find_pictures, read_picture, why_no_picture
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.core.settings import SamplingSettings
from diffusers_ext.families.registry import find_family
from diffusers_ext.nullspace.step import Condition


def latent_scale(vae: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What the denoiser's latents are to those of a VAE.

    Returns:
        `(offset, factor)`, float32 `(1, channels or 1, 1, 1)`, with `denoiser's = (VAE's - offset) * factor`.
    """
    config = vae.config
    means, stds = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if means is None or stds is None:
        means, stds = [getattr(config, "shift_factor", None) or 0.0], [1.0]
    offset, spread = (
        torch.tensor(values, dtype=torch.float32, device=vae.device).view(1, -1, 1, 1) for values in (means, stds)
    )
    return offset, config.scaling_factor / spread


def own_resolution(pipeline: DiffusionPipeline) -> int | None:
    """Pixels a side of the pictures that a UNet was made for; `None` where they are not square."""
    size = pipeline.unet.config.sample_size
    sides = {size} if isinstance(size, int) else set(size or ())
    return sides.pop() * pipeline.vae_scale_factor if len(sides) == 1 else None


def sampling_arguments(settings: SamplingSettings) -> dict[str, Any]:
    """Arguments of a pipeline's call from the command line's sampling group."""
    return {
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        # Not the empty string: SDXL reads zeros in place of a prompt that is not given.
        "negative_prompt": settings.negative_prompt or None,
    }


@torch.no_grad()
def draw_images(
    pipeline: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], resolution: int, **run: Any
) -> list[Image.Image]:
    """One picture per prompt, unfiltered and in eval mode; the pipeline is left as it was.

    A picture depends on its prompt and its seed, not on the others (up to rounding).

    Args:
        pipeline: draws.
        prompts, seeds: one of each per picture.
        resolution: height and width in pixels.
        run: further arguments of the pipeline's call, as of `sampling_arguments`.
    """
    vae = pipeline.vae
    offset, factor = latent_scale(vae)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if run.get("negative_prompt") is not None:
        run["negative_prompt"] = [run["negative_prompt"]] * len(generators)
    with quiet_run(pipeline):
        latents = pipeline(
            list(prompts), height=resolution, width=resolution, generator=generators, output_type="latent", **run
        ).images
        latents = (latents.float() / factor + offset).to(vae.dtype)
        with torch.autocast(latents.device.type, enabled=False):  # VAEs overflow in float16
            pixels = torch.cat([vae.decode(latent).sample for latent in latents.split(1)])
    return pipeline.image_processor.postprocess(pixels, output_type="pil")




def list_images(folder: str | Path, name: str = "instance_data_dir") -> list[Path]:
    """The picture files of a folder in order of name; raises `ValueError` where there is none."""
    return list(find_pictures(folder, name).paths)


def load_image(path: Path, resolution: int, center_crop: bool = True) -> torch.Tensor:
    """One picture as `(3, resolution, resolution)` float32 in [-1, 1], as `read_picture` sees it.

    `center_crop` cuts a square out of the middle; without it the picture is squeezed. Raises `ValueError` for a file
    that is no picture.
    """
    image, size = read_picture(path), (resolution, resolution)
    if center_crop:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    else:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1.0


@torch.no_grad()
def encode_images(
    pipeline: DiffusionPipeline, paths: list[Path], resolution: int, *, center_crop: bool, flip: bool
) -> TensorDataset:
    """Latent means and standard deviations of pictures, scaled for the denoiser.

    Returns:
        A data set of `(mean, std)`, each `(channels, height, width)` float32; twice as long with `flip`.
    """
    vae = pipeline.vae
    offset, factor = latent_scale(vae)
    means, stds = [], []
    for path in paths:
        pixels = load_image(path, resolution, center_crop)
        for view in [pixels, pixels.flip(-1)] if flip else [pixels]:
            posterior = vae.encode(view[None].to(vae.device, vae.dtype)).latent_dist
            means.append((posterior.mean.float() - offset) * factor)
            stds.append(posterior.std.float() * factor)
    return TensorDataset(torch.cat(means), torch.cat(stds))


def with_prompts(dataset: TensorDataset, of_pictures: Sequence[str], prompts: Sequence[str]) -> TensorDataset:
    """`(mean, std, index)` of pictures with captions: the index of each one's prompt among `prompts`.

    Args:
        dataset: of `encode_images`, in which a picture may have several views one after another.
        of_pictures: the prompt of each picture.
        prompts: each once, in the order of the condition's rows.
    """
    index = torch.tensor([prompts.index(prompt) for prompt in of_pictures])
    return TensorDataset(*dataset.tensors, index.repeat_interleave(len(dataset) // len(index)))


@torch.no_grad()
def encode_condition(pipeline: DiffusionPipeline, prompt: str, resolution: int) -> Condition:
    """Encode one prompt once; the text encoder is frozen."""
    encoded = pipeline.encode_prompt(
        prompt=prompt, device=pipeline._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    family = find_family(pipeline, "nullspace")
    place = family.text_outputs.get("pooled_prompt_embeds")
    pooled = None if place is None else encoded[place]
    size, dtype = (resolution, resolution), encoded[0].dtype
    return Condition(encoded[0], family.added_conditions(pipeline, pooled, *size, dtype))


def encode_conditions(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> Condition:
    """Encode prompts, each as `encode_condition` does it alone, into the rows of one condition."""
    each = [encode_condition(pipeline, prompt, resolution) for prompt in prompts]
    added = {name: torch.cat([one.added[name] for one in each]) for name in each[0].added}
    return Condition(torch.cat([one.prompt_embeds for one in each]), added)


def make_class_images(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    prompt: str,
    count: int,
    *,
    batch_size: int,
    seed: int,
    resolution: int,
    **run: Any,
) -> list[Path]:
    """Fill `folder` up to `count` pictures of the class, drawn by the base model itself.

    `run` goes to the pipeline's call. A killed run goes on where it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    present = [path for path in folder.iterdir() if why_no_picture(path) is None]
    missing = [i for i in range(count) if not (folder / f"class_{i:05d}.png").exists()]
    missing = missing[: max(0, count - len(present))]
    starts = range(0, len(missing), batch_size)
    for start in tqdm(starts, desc="class pictures", disable=not missing):
        indices = missing[start : start + batch_size]
        seeds = [seed + index for index in indices]
        images = draw_images(pipeline, [prompt] * len(indices), seeds, resolution, **run)
        for index, image in zip(indices, images, strict=True):
            content = io.BytesIO()
            image.save(content, "png")
            write_atomically(folder / f"class_{index:05d}.png", content.getvalue())
    return list_images(folder, "class_data_dir")
