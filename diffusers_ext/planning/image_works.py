"""What runs over pictures are made of: text encoding, guided denoiser calls, encoding, decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from diffusers_ext.golden_noise.denoiser import guided_prediction
from diffusers_ext.planning.image_shapes import ImageShapes
from diffusers_ext.planning.work import Job, Precision, Work


_TIMESTEP = 500


def encode_prompts_work(shapes: ImageShapes, rows: int, times: float, precision: Precision) -> Work:
    """All text encoders read `rows` prompts, as `encode_prompt` lets them."""
    names = shapes.base.text_encoders
    hidden = shapes.family in ("sdxl", "sd3")

    def make() -> Job:
        encoders = [shapes.base.components[name].build(precision.dtype) for name in names]
        lengths = [shapes.encoder_tokens(name) for name in names]

        @torch.no_grad()
        def repeat() -> list[object]:
            return [
                encoder(
                    torch.zeros(rows, length, dtype=torch.long, device=encoder.device),
                    output_hidden_states=hidden,
                )
                for encoder, length in zip(encoders, lengths, strict=True)
            ]

        return Job(encoders, lambda _: repeat)

    return Work("text encoders' activations", times, make)


def guided_work(
    shapes: ImageShapes,
    rows: int,
    guidance_scales: Sequence[float],
    times: float,
    precision: Precision,
    name: str = "denoiser's activations",
    *,
    autocast: bool = False,
) -> Work:
    """The denoiser is asked once under each guidance scale for `rows` pictures.

    Args:
        shapes: of the model.
        rows: pictures at once; guidance doubles them inside.
        guidance_scales: one call each.
        times: how often in a run.
        precision: of the denoiser.
        name: of the memory.
        autocast: the denoiser is one that trains, which accelerate runs under autocast.
    """

    def make() -> Job:
        pipeline = shapes.pipeline(precision.dtype, torch.float32)
        denoiser = getattr(pipeline, shapes.base.denoiser)

        def begin(device: torch.device) -> Callable[[], object]:
            latents = torch.randn(rows, *shapes.latents, device=device)
            text = shapes.conditioning(rows, device, precision.dtype)

            @torch.no_grad()
            def repeat() -> None:
                state = latents
                for scale in guidance_scales:
                    output = guided_prediction(pipeline, state, _TIMESTEP, text, scale)
                    state = latents + 0.1 * output

            @torch.no_grad()
            def repeat_under_autocast() -> None:
                with precision.autocast(denoiser):
                    repeat()

            return repeat_under_autocast if autocast else repeat

        return Job([denoiser, pipeline.vae], begin)

    return Work(name, times, make)


def decode_work(shapes: ImageShapes, rows: int, times: float, dtype: torch.dtype) -> Work:
    """The VAE turns latents of `rows` pictures into pixels at once."""

    def make() -> Job:
        vae = shapes.base.components["vae"].build(dtype)

        def begin(device: torch.device) -> Callable[[], object]:
            latents = torch.randn(rows, *shapes.latents, dtype=dtype, device=device)
            return torch.no_grad()(lambda: vae.decode(latents, return_dict=False)[0])

        return Job([vae], begin)

    return Work("VAE's decoding", times, make)


def encode_work(shapes: ImageShapes, rows: int, times: float, dtype: torch.dtype) -> Work:
    """The VAE turns `rows` pictures into latents at once."""

    def make() -> Job:
        vae = shapes.base.components["vae"].build(dtype)

        def begin(device: torch.device) -> Callable[[], object]:
            size = (rows, 3, shapes.resolution, shapes.resolution)
            pixels = torch.randn(size, dtype=dtype, device=device)
            return torch.no_grad()(lambda: vae.encode(pixels, return_dict=False)[0].mean)

        return Job([vae], begin)

    return Work("VAE's encoding", times, make)
