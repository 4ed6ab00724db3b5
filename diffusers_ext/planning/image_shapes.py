"""Sizes of what a text-to-image pipeline reads and makes, from its configs."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline

from diffusers_ext.families.registry import families_of
from diffusers_ext.golden_noise.conditioning import TextConditioning
from diffusers_ext.planning.base_model import BaseModel


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
        families = {f.pipelines[0]: f for f in families_of("golden_noise")}
        if base.pipeline not in families:
            raise ValueError(
                f"`model` must be a pipeline of {sorted(families)}, got {base.pipeline or 'none'} in "
                f"{base.name}."
            )
        self.base, self.family = base, families[base.pipeline]
        self.config = _config_of(base, base.denoiser)
        scale = 2 ** (len(_config_of(base, "vae").block_out_channels) - 1)
        own = self.family.sample_size(self.config)
        self.resolution = own * scale if resolution is None else resolution
        patch = self.family.patch(self.config)
        if self.resolution < 1 or self.resolution % (scale * patch):
            raise ValueError(
                f"`resolution` must be a multiple of {scale * patch} for {base.name}, got "
                f"{self.resolution}."
            )
        channels = self.family.latent_channels(self.config)
        side = self.resolution // scale
        self.latents = (channels, side, side)
        self.text = self._text()

    @property
    def embedded_guidance(self) -> bool:
        """Whether the denoiser takes the guidance scale as an input, so that one call is enough."""
        return self.family.embedded_guidance(self.config)

    def encoder_tokens(self, name: str) -> int:
        """How many tokens a text encoder reads."""
        component = self.base.components[name]
        if component.class_name.startswith("T5"):
            return self.family.t5_tokens
        own = self.config.get("text_len")  # of Hunyuan-DiT's BERT
        return own or _config_of(self.base, name).max_position_embeddings

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

    def pipeline(self, dtype: torch.dtype, vae_dtype: torch.dtype) -> DiffusionPipeline:
        """The pipeline on the meta device with its denoiser and its VAE alone."""
        names = (self.base.denoiser, "vae")
        dtypes = (dtype, vae_dtype)
        models = {n: self.base.components[n].build(d) for n, d in zip(names, dtypes, strict=True)}
        pipeline_class = getattr(diffusers, self.base.pipeline)
        required = inspect.signature(pipeline_class.__init__).parameters.values()
        absent: dict[str, Any] = {
            part.name: None
            for part in required
            if part.name != "self" and part.default is inspect.Parameter.empty
        }
        if "requires_safety_checker" in inspect.signature(pipeline_class.__init__).parameters:
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


def _config_of(base: BaseModel, name: str) -> Any:
    if name not in base.components:
        raise ValueError(
            f"`model` must have a {name}, got {base.name} with {sorted(base.components)}."
        )
    return base.components[name].whole_config()
