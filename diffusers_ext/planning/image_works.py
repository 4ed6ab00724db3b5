"""What runs over pictures are made of: text encoding, guided denoiser calls, encoding, decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffusers_ext.golden_noise.denoiser import guided_prediction
from diffusers_ext.golden_noise.noise_statistics import match_energy, noise_statistics
from diffusers_ext.planning.golden_noise_setting import GoldenNoiseSetting
from diffusers_ext.planning.image_shapes import ImageShapes
from diffusers_ext.planning.work import Job, Precision, Work


_TIMESTEP = 500


def encode_prompts_work(shapes: ImageShapes, rows: int, times: float, precision: Precision) -> Work:
    """All text encoders read `rows` prompts, as `encode_prompt` lets them."""
    names = shapes.base.text_encoders
    hidden = shapes.family.reads_hidden_states

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
    shapes: ImageShapes, rows: int, guidance_scale: float, times: float, precision: Precision
) -> Work:
    """A step of drawing `rows` pictures; guidance doubles them inside."""

    def make() -> Job:
        pipeline = shapes.pipeline(precision.dtype, torch.float32)

        def begin(device: torch.device) -> Callable[[], object]:
            latents = torch.randn(rows, *shapes.latents, device=device)
            text = shapes.conditioning(rows, device, precision.dtype)

            @torch.no_grad()
            def repeat() -> torch.Tensor:
                output = guided_prediction(pipeline, latents, _TIMESTEP, text, guidance_scale)
                return latents + 0.1 * output

            return repeat

        return Job([getattr(pipeline, shapes.base.denoiser), pipeline.vae], begin)

    return Work("denoiser's activations", times, make)


def redenoise_work(
    shapes: ImageShapes, setting: GoldenNoiseSetting, rows: int, times: float, precision: Precision
) -> Work:
    """Golden noises of `rows` pairs: two denoiser calls each, and what is noted of them."""

    def make() -> Job:
        pipeline = shapes.pipeline(precision.dtype, torch.float32)

        def begin(device: torch.device) -> Callable[[], object]:
            text = shapes.conditioning(rows, device, precision.dtype)

            @torch.no_grad()
            def repeat() -> None:
                source = noise = torch.randn(rows, *shapes.latents).to(device)
                states = []
                for _ in range(setting.num_steps):
                    first = guided_prediction(pipeline, noise, _TIMESTEP, text, setting.w1)
                    lower = 0.9 * noise + 0.1 * first
                    second = guided_prediction(pipeline, lower, _TIMESTEP, text, setting.w2)
                    noise = match_energy(noise + (0.1 * first + 0.1 * second), source)
                    states.append(noise)
                deltas = torch.stack(states, 1).cpu() - source.cpu()[:, None]
                noise_statistics(source.cpu() + deltas.half()[:, -1].float())

            return repeat

        return Job([getattr(pipeline, shapes.base.denoiser), pipeline.vae], begin)

    return Work("denoiser's activations", times, make)


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
