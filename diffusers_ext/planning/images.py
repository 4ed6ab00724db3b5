"""Text-to-image runs as shapes: sizes from a pipeline's configs, and the works that runs are made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline

from diffusers_ext.families.registry import families_of
from diffusers_ext.families.text_conditioning import TextConditioning
from diffusers_ext.golden_noise.noise_statistics import match_energy, noise_statistics
from diffusers_ext.golden_noise.redenoise import guided_prediction
from diffusers_ext.planning.models import BaseModel
from diffusers_ext.planning.work import Job, Precision, Work, inference_work

TIMESTEP = 500


class TextShape(NamedTuple):
    """One prompt as the denoiser reads it."""

    tokens: int
    width: int
    pooled: int | None
    second: tuple[int, int] | None  # tokens and width of a second text (Hunyuan-DiT)
    masked: bool


class ImageShapes:
    """Shapes of one base model at one size of pictures.

    Args:
        base: a pipeline that golden noise is known for.
        resolution: pixels of a side; the model's own when `None`.

    Attributes:
        family: that it belongs to.
        resolution: pixels of a side.
        latents: `(channels, height, width)`, unpacked also for Flux.
        text: of one prompt.

    Raises:
        ValueError: another pipeline, or a size that it cannot draw.
    """

    def __init__(self, base: BaseModel, resolution: int | None = None) -> None:
        families = {family.pipelines[0]: family for family in families_of("golden_noise")}
        if base.pipeline not in families:
            raise ValueError(
                f"`model` must be a pipeline of {sorted(families)}, got {base.pipeline or 'none'} in {base.name}."
            )
        self.base, self.family = base, families[base.pipeline]
        self.config = base.component(base.denoiser).whole_config()
        scale = 2 ** (len(base.component("vae").whole_config().block_out_channels) - 1)
        own = self.family.sample_size(self.config) * scale
        self.resolution = own if resolution is None else resolution
        multiple = scale * self.family.patch(self.config)
        if self.resolution < 1 or self.resolution % multiple:
            raise ValueError(f"`resolution` must be a multiple of {multiple} for {base.name}, got {self.resolution}.")
        side = self.resolution // scale
        self.latents = (self.family.latent_channels(self.config), side, side)
        self.text = self._text()

    @property
    def embedded_guidance(self) -> bool:
        """Whether the denoiser takes the guidance scale as an input, so that one call is enough."""
        return self.family.embedded_guidance(self.config)

    def encoder_tokens(self, name: str) -> int:
        """How many tokens a text encoder reads."""
        component = self.base.component(name)
        if component.class_name.startswith("T5"):
            return self.family.t5_tokens
        own = self.config.get("text_len")  # of Hunyuan-DiT's BERT
        return own or component.whole_config().max_position_embeddings

    def conditioning(self, rows: int, device: torch.device, dtype: torch.dtype) -> TextConditioning:
        """Prompts without content, with their negative ones where the model takes any."""
        shape = self.text
        made = {"prompt_embeds": torch.randn(rows, shape.tokens, shape.width, dtype=dtype)}
        if shape.pooled is not None:
            made["pooled_prompt_embeds"] = torch.randn(rows, shape.pooled, dtype=dtype)
        if shape.second is not None:
            made["prompt_embeds_2"] = torch.randn(rows, *shape.second, dtype=dtype)
            made["attention_mask_2"] = torch.ones(rows, shape.second[0], dtype=torch.long)
        if shape.masked:
            made["attention_mask"] = torch.ones(rows, shape.tokens, dtype=torch.long)
        if not self.embedded_guidance:
            made |= {f"negative_{name}": tensor.clone() for name, tensor in made.items()}
        return TextConditioning(**made).to(device)

    def pipeline(self, dtype: torch.dtype) -> DiffusionPipeline:
        """The pipeline on the meta device with its denoiser and its VAE, in float32, alone."""
        dtypes = {self.base.denoiser: dtype, "vae": torch.float32}
        models = {name: self.base.component(name).build(dtypes[name]) for name in dtypes}
        pipeline_class = getattr(diffusers, self.base.pipeline)
        parameters = inspect.signature(pipeline_class.__init__).parameters
        absent: dict[str, Any] = {
            name: None for name, one in parameters.items() if name != "self" and one.default is inspect.Parameter.empty
        }
        if "requires_safety_checker" in parameters:
            absent["requires_safety_checker"] = False
        absent["scheduler"] = (
            diffusers.FlowMatchEulerDiscreteScheduler()
            if self.family.flow_matching
            else diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
        )
        return pipeline_class(**{**absent, **models})

    def _text(self) -> TextShape:
        config, family = self.config, self.family
        shapes = family.text_shapes(config)
        tokens, width = shapes["prompt_embeds"]
        if tokens is None:
            present = self.base.text_encoders
            read = (n if n in present else present[-1] for n in family.token_encoders)
            tokens = sum(map(self.encoder_tokens, read))
        second = shapes.get("prompt_embeds_2")
        masked = "attention_mask" in family.text_fields
        return TextShape(tokens, width, family.pooled_width(config), second, masked)


def encode_prompts_work(shapes: ImageShapes, rows: int, times: float, precision: Precision) -> Work:
    """All text encoders read `rows` prompts, as `encode_prompt` lets them."""
    names, hidden = shapes.base.text_encoders, shapes.family.reads_hidden_states
    sizes = [(rows, shapes.encoder_tokens(name)) for name in names]

    def build() -> torch.nn.Module:
        return torch.nn.ModuleList(shapes.base.component(name).build(precision.dtype) for name in names)

    def begin(encoders: torch.nn.Module, device: torch.device) -> Callable[[], object]:
        return lambda: [
            encoder(torch.zeros(size, dtype=torch.long, device=device), output_hidden_states=hidden)
            for encoder, size in zip(encoders, sizes, strict=True)
        ]

    return inference_work("text encoders' activations", times, build, begin)


def denoiser_work(
    shapes: ImageShapes,
    times: float,
    precision: Precision,
    begin: Callable[[DiffusionPipeline, torch.device], Callable[[], object]],
    kept_name: str | None = None,
) -> Work:
    """Calls of the denoiser in its pipeline, without gradients; as `inference_work`."""

    def make() -> Job:
        pipeline = shapes.pipeline(precision.dtype)
        modules = [getattr(pipeline, shapes.base.denoiser), pipeline.vae]
        return Job(modules, lambda device: torch.no_grad()(begin(pipeline, device)))

    return Work("denoiser's activations", times, make, kept_name)


def guided_work(shapes: ImageShapes, rows: int, guidance_scale: float, times: float, precision: Precision) -> Work:
    """A step of drawing `rows` pictures; guidance doubles them inside."""

    def begin(pipeline: DiffusionPipeline, device: torch.device) -> Callable[[], object]:
        latents = torch.randn(rows, *shapes.latents, device=device)
        text = shapes.conditioning(rows, device, precision.dtype)
        predict = partial(guided_prediction, pipeline, latents, TIMESTEP, text, guidance_scale)
        return lambda: latents + 0.1 * predict()

    return denoiser_work(shapes, times, precision, begin)


def redenoise_work(shapes: ImageShapes, setting: Any, rows: int, times: float, precision: Precision) -> Work:
    """Golden noises of `rows` pairs: two denoiser calls each, and what is noted of them."""

    def begin(pipeline: DiffusionPipeline, device: torch.device) -> Callable[[], object]:
        text = shapes.conditioning(rows, device, precision.dtype)

        def repeat() -> None:
            source = noise = torch.randn(rows, *shapes.latents).to(device)
            states = []
            for _ in range(setting.num_steps):
                first = guided_prediction(pipeline, noise, TIMESTEP, text, setting.w1)
                lower = 0.9 * noise + 0.1 * first
                second = guided_prediction(pipeline, lower, TIMESTEP, text, setting.w2)
                noise = match_energy(noise + (0.1 * first + 0.1 * second), source)
                states.append(noise)
            deltas = torch.stack(states, 1).cpu() - source.cpu()[:, None]
            noise_statistics(source.cpu() + deltas.half()[:, -1].float())

        return repeat

    return denoiser_work(shapes, times, precision, begin)


def vae_work(shapes: ImageShapes, rows: int, times: float, dtype: torch.dtype, *, decodes: bool) -> Work:
    """The VAE turns latents of `rows` pictures into pixels at once, or pixels into latents."""
    pixels = (3, shapes.resolution, shapes.resolution)

    def begin(vae: torch.nn.Module, device: torch.device) -> Callable[[], object]:
        size = (rows, *(shapes.latents if decodes else pixels))
        given = torch.randn(size, dtype=dtype, device=device)
        if decodes:
            return lambda: vae.decode(given, return_dict=False)[0]
        return lambda: vae.encode(given, return_dict=False)[0].mean

    name = f"VAE's {'decoding' if decodes else 'encoding'}"
    return inference_work(name, times, partial(shapes.base.component("vae").build, dtype), begin)
