"""Pictures drawn by a pipeline whose VAE is in float32, whatever the type of its denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.core.quiet_run import quiet_run
from diffusers_ext.core.run_settings import SamplingSettings


def latent_scale(vae: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What the denoiser's latents are to those of a VAE.

    Returns:
        `(offset, factor)`, float32 `(1, channels or 1, 1, 1)`, with
        `denoiser's = (VAE's - offset) * factor`.
    """
    config = vae.config
    means, stds = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if means is None or stds is None:
        means, stds = [getattr(config, "shift_factor", None) or 0.0], [1.0]
    offset, spread = (
        torch.tensor(values, dtype=torch.float32, device=vae.device).view(1, -1, 1, 1)
        for values in (means, stds)
    )
    return offset, config.scaling_factor / spread


def own_resolution(pipeline: DiffusionPipeline) -> int | None:
    """Pixels a side of the pictures that a UNet was made for; `None` where they are not square."""
    size = pipeline.unet.config.sample_size
    sides = {size} if isinstance(size, int) else set(size or ())
    return sides.pop() * pipeline.vae_scale_factor if len(sides) == 1 else None


def sampling_arguments(args: SamplingSettings) -> dict[str, Any]:
    """Arguments of a pipeline's call from the command line's sampling group."""
    return {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        # Not the empty string: SDXL reads zeros in place of a prompt that is not given.
        "negative_prompt": args.negative_prompt or None,
    }


@torch.no_grad()
def draw_images(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    resolution: int,
    **run: Any,
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
            list(prompts),
            height=resolution,
            width=resolution,
            generator=generators,
            output_type="latent",
            **run,
        ).images
        latents = (latents.float() / factor + offset).to(vae.dtype)
        with torch.autocast(latents.device.type, enabled=False):  # VAEs overflow in float16
            pixels = torch.cat([vae.decode(latent).sample for latent in latents.split(1)])
    return pipeline.image_processor.postprocess(pixels, output_type="pil")
