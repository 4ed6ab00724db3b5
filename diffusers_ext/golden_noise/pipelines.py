"""Pipelines of all image families that start from noise which suits the prompt."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import (
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    HunyuanDiTPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)

from diffusers_ext.core.call_arguments import check_number
from diffusers_ext.core.pipelines import HandOver, add_component, register_auto_pipeline
from diffusers_ext.core.settings import check_keywords
from diffusers_ext.families import Family, find_family
from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.card import pipeline_card
from diffusers_ext.golden_noise.diversity import spread_pictures
from diffusers_ext.golden_noise.first_prediction import predict_picture
from diffusers_ext.golden_noise.frames import as_clips, as_pictures
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork, load_noise_model
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.networks.npnet import NPNet, refuse_npnet
from diffusers_ext.golden_noise.networks.sequence_rnn import NoiseSequenceRNN
from diffusers_ext.golden_noise.networks.sequence_transformer import NoiseSequenceTransformer
from diffusers_ext.golden_noise.redenoise import TOOL
from diffusers_ext.hub.card import Card
from diffusers_ext.hub.push import PushWithCard
from diffusers_ext.hub.saved_pipelines import ReadAlike

# `from_pipe` hands a component over only if its very class is in the annotation.
NoiseModel = NPNet | GoldenNoiseModel | NoiseSequenceTransformer | NoiseSequenceRNN

# Read by diffusers from `**kwargs`, with a warning.
_DEPRECATED_IN_CALLS = ("callback", "callback_steps")
# Of a call, besides the plain pipeline's.
_PARAMETERS = tuple(
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type(default))
    for name, default in (("golden_noise_scale", 1.0), ("diversity", 0.0), ("diversity_of", "prediction"))
)
_SCALE_DOC = """Draw pictures from noise that the `noise_model` refined for their prompts.

`golden_noise_scale` (`float`, defaults to 1.0): 0 draws what the plain pipeline draws, 1 from the
network's noise, values between and beyond from the line through both.

`diversity` (`float`, defaults to 0.0): above 0, up to 1, pictures of one prompt are spread apart while they are
drawn, with or without a `noise_model`. `diversity_of` (`str`, defaults to "prediction") says by what: "prediction"
moves what the denoiser predicts in every step, by eight further calls of it each time; "prompt" moves the prompt's
embeddings in the first step, by none; "both" is both. Everything else, given `latents` refined as well, is as in the
plain pipeline:

"""


@dataclass
class _GoldenCall:
    """What one `__call__` has to remember until its noise is drawn."""

    scale: float
    given_embeds: Any = None  # that the pipeline may not hand to `encode_prompt`
    text: dict[str, torch.Tensor | None] = field(default_factory=dict)  # arguments of `refine`


class GoldenNoiseMixin(HandOver, ReadAlike, PushWithCard):
    """What these pipelines add: a `noise_model` component that refines the noise of each call.

    It stands before a diffusers pipeline, whose `encode_prompt` and `prepare_latents` are where the text is read and
    the noise is changed. Without a `noise_model` it is that pipeline to the bit. Uploads get a card; the facts for it
    are the arguments of `diffusers_ext.golden_noise.card.pipeline_card`.
    """

    _left_behind: ClassVar[dict[str, str]] = {
        "noise_model": "Make the noise with `noise_model.refine` and pass it as `latents` "
        '(docs/golden_noise.md, "Other pipelines").'
    }
    _golden_call: _GoldenCall | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if GoldenNoiseMixin in cls.__bases__:
            plain = super()
            add_component(cls, "noise_model", NoiseModel)
            # Right before the denoiser, for which it makes the noise.
            order = cls.model_cpu_offload_seq
            cls.model_cpu_offload_seq = re.sub("->(unet|transformer)", r"->noise_model->\1", order)
            register_auto_pipeline(cls)
            cls.__call__ = _shown_as(plain.__call__, GoldenNoiseMixin.__call__, _PARAMETERS, _SCALE_DOC)
            cls.encode_prompt = _shown_as(plain.encode_prompt, GoldenNoiseMixin.encode_prompt)
            cls.prepare_latents = _shown_as(plain.prepare_latents, GoldenNoiseMixin.prepare_latents)

    def load_noise_model(self, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> None:
        """`load_noise_model` onto the pipeline's device, then `set_noise_model`."""
        self.set_noise_model(load_noise_model(pretrained_model_name_or_path, **kwargs).to(self.device))

    def set_noise_model(self, noise_model: GoldenNoiseNetwork | None) -> None:
        """Make `noise_model` a component, so that `save_pretrained` and `push_to_hub` include it.

        Offloading that is switched on does not cover it: switch it on again afterwards. A network for other latents or
        other text than the pipeline's is a `ValueError`.
        """
        if noise_model is not None:
            if not isinstance(noise_model, GoldenNoiseNetwork):
                raise TypeError(
                    f"`noise_model` must be a golden-noise network, got a {type(noise_model).__name__}. Use "
                    "`load_noise_model` for a folder or Hub name."
                )
            self._check_sizes(noise_model)
        self.register_modules(noise_model=noise_model)

    def __call__(
        self,
        *args: Any,
        golden_noise_scale: float = 1.0,
        diversity: float = 0.0,
        diversity_of: str = "prediction",
        **kwargs: Any,
    ) -> Any:
        """As in the plain pipeline, from refined noise; see `help(pipeline.__call__)`."""
        scale = check_number("golden_noise_scale", golden_noise_scale)
        diversity = check_number("diversity", diversity, 0.0, 1.0)
        # The plain pipeline would pass over a keyword that it does not know in silence.
        calls = [owner.__call__ for owner in type(self).__mro__ if "__call__" in vars(owner)]
        takes = {name for call in calls for name in inspect.signature(call).parameters}
        known = sorted(takes - {"self", "args", "kwargs"}) + list(_DEPRECATED_IN_CALLS)
        check_keywords(kwargs, known, f"{type(self).__name__}.__call__")
        outer = self._golden_call
        active = self.noise_model is not None and scale != 0
        given = inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments
        self._golden_call = _GoldenCall(scale, given.get("prompt_embeds")) if active else None
        try:
            with spread_pictures(self, find_family(self, TOOL), diversity, diversity_of):
                return super().__call__(*args, **kwargs)
        finally:
            self._golden_call = outer

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """As in the plain pipeline; during a call the text is kept for the `noise_model`."""
        encoded = super().encode_prompt(*args, **kwargs)
        call = self._golden_call
        # The first is the conditional text: of further ones Flux makes the negative prompt's,
        # Hunyuan-DiT the T5's.
        if call is not None and not call.text:
            call.text = find_family(self, TOOL).network_text(encoded, kwargs)
        return encoded

    def prepare_latents(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As in the plain pipeline; during a call the `noise_model` refines them."""
        plain = super().prepare_latents
        prepared = plain(*args, **kwargs)
        call = self._golden_call
        if call is None:
            return prepared
        family = find_family(self, TOOL)
        given = inspect.signature(plain).bind(*args, **kwargs).arguments
        # Flux returns the positions of its packed latents as well.
        latents, *others = prepared if isinstance(prepared, tuple) else (prepared,)
        text = call.text or family.network_text((call.given_embeds,), {})
        size = given["height"], given["width"]
        golden = refined_latents(self, family, self.noise_model, latents, size, text, call.scale)
        return (golden, *others) if others else golden

    def _card(self, *, token: str | None, **facts: Any) -> Callable[..., Card]:
        return pipeline_card(self, token=token, **facts)

    def _check_sizes(self, noise_model: GoldenNoiseNetwork) -> None:
        family = find_family(self, TOOL)
        denoiser = getattr(self, family.denoiser)
        if denoiser is not None:
            check_sizes(noise_model, family, denoiser.config, type(self).__name__)


def check_sizes(noise_model: GoldenNoiseNetwork, family: Family, config: Any, owner: str) -> None:
    """Raise `ValueError` for a network made for other latents or other text than a denoiser of this config."""
    sizes = family.network_sizes(config)
    network = noise_model.config
    text_width = sizes.pooled_dim if network.get("pooled_text") else sizes.text_embed_dim
    for name, size in (("in_channels", sizes.in_channels), ("text_embed_dim", text_width)):
        if size is None:
            raise ValueError(
                "`noise_model` must read tokens in a pipeline whose text encoder does not "
                f"pool, got one with `pooled_text` for a {owner}."
            )
        if network.get(name, size) != size:
            raise ValueError(f"`noise_model` must have `{name}` {size} like the {owner}, got {network[name]}.")
    if isinstance(noise_model, NPNet):
        refuse_npnet(family, sizes.in_channels)


def refined_latents(
    pipeline: Any,
    family: Family,
    noise_model: GoldenNoiseNetwork,
    latents: torch.Tensor,
    size: tuple[int, int],
    text: Mapping[str, torch.Tensor | None],
    scale: float,
) -> torch.Tensor:
    """Latents of a call as its `prepare_latents` made them, refined; clips latent frame by latent frame.

    Args:
        pipeline: with the scheduler, and what `family.pack` and `unpack` read of it.
        size: height and width in pixels.
        text: arguments of `refine`; rows stand for as many latents each as there are more of these.
    """
    clips = latents.ndim == 5
    pictures = as_pictures(latents).unsqueeze(2) if clips else latents
    sigma = 1.0 if family.flow_matching else pipeline.scheduler.init_noise_sigma
    noise = family.unpack(pipeline, pictures, *size).float() / sigma
    text = {name: _repeated(rows, len(noise)) for name, rows in text.items()}
    predict = None
    if noise_model.guard is not None and not clips:  # which may read what the model makes of the noise
        predict = partial(predict_picture, pipeline, family, TextConditioning(**text))
    golden = family.pack(pipeline, noise_model.refine(noise, scale=scale, predict=predict, **text) * sigma)
    if clips:
        golden = as_clips(golden.squeeze(2), latents)
    elif golden.ndim > latents.ndim:  # FLUX.2 takes them as they are and makes tokens of them here
        golden = golden.flatten(2).transpose(1, 2)
    return golden.to(latents.dtype)


def _repeated(rows: torch.Tensor | None, count: int) -> torch.Tensor | None:
    return rows if rows is None or len(rows) == count else rows.repeat_interleave(count // len(rows), 0)


def _shown_as(
    plain: Callable[..., Any],
    method: Callable[..., Any],
    further: tuple[inspect.Parameter, ...] = (),
    introduction: str = "",
) -> Callable[..., Any]:
    """`method` with the signature of `plain` and `further` arguments, for `help` and editors."""

    def shown(self: object, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    signature = inspect.signature(plain)
    if further:
        parameters = list(signature.parameters.values())
        last = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
        place = len(parameters) - last
        parameters[place:place] = further
        signature = signature.replace(parameters=parameters)
    shown.__signature__ = signature
    shown.__name__ = plain.__name__
    shown.__doc__ = introduction + (inspect.getdoc(plain) or "")
    return shown


class GoldenNoisePipeline(GoldenNoiseMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""


class GoldenNoiseXLPipeline(GoldenNoiseMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""


class GoldenNoiseHunyuanDiTPipeline(GoldenNoiseMixin, HunyuanDiTPipeline):
    """`HunyuanDiTPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`.

    The network reads the first encoder's (BERT) text with its mask.
    """


class GoldenNoiseSD3Pipeline(GoldenNoiseMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""


class GoldenNoiseFluxPipeline(GoldenNoiseMixin, FluxPipeline):
    """`FluxPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`.

    The network reads the T5 text and sees the latents unpacked.
    """


class GoldenNoiseFlux2KleinPipeline(GoldenNoiseMixin, Flux2KleinPipeline):
    """`Flux2KleinPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`.

    The network sees the patched latents, four times as many channels on half the side, that the denoiser sees.
    """


class GoldenNoiseFlux2Pipeline(GoldenNoiseMixin, Flux2Pipeline):
    """`Flux2Pipeline` (dev) with an optional `noise_model`; see `GoldenNoiseMixin`, and for the latents klein's."""


class GoldenNoiseZImagePipeline(GoldenNoiseMixin, ZImagePipeline):
    """`ZImagePipeline` with an optional `noise_model`; see `GoldenNoiseMixin`.

    The network reads texts of different lengths as one batch with a mask.
    """


class GoldenNoiseQwenImagePipeline(GoldenNoiseMixin, QwenImagePipeline):
    """`QwenImagePipeline` with an optional `noise_model`; see `GoldenNoiseMixin`.

    The network sees the latents unpacked and without their axis of frames, and reads the text with its mask.
    """
