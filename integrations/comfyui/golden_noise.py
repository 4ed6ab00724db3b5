"""Node *Golden Noise*: turns the noise of a seed into one that suits the prompt, before the first step.

A NOISE of ComfyUI is an object with a `seed` and with `generate_noise(latent)`, which gives noise of unit variance in
the shape of the latent's `samples`; the sampler scales it. That is the noise which golden-noise networks take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch

from diffusers_ext import GoldenNoiseNetwork, load_noise_model
from diffusers_ext.core.call_arguments import check_number
from diffusers_ext.golden_noise.diversity import mean_prediction, step_spread
from diffusers_ext.golden_noise.frames import as_clips, as_pictures

Conditioning = Sequence[tuple[torch.Tensor, dict[str, Any]]]


class Noise(Protocol):
    """What ComfyUI's samplers ask of a NOISE."""

    seed: int

    def generate_noise(self, input_latent: dict[str, Any]) -> torch.Tensor:
        """Noise of unit variance in the shape of `input_latent["samples"]`."""


class RefinedNoise:
    """A NOISE refined by a network for one prompt.

    Args:
        noise: where the seed's noise comes from.
        network: of `load_noise_model`.
        conditioning: of one prompt; its text is repeated for the pictures of a batch, as the samplers do it.
        strength: 0 gives the noise that came in to the bit, 1 the network's.
        device: where the network computes.
    """

    def __init__(
        self,
        noise: Noise,
        network: GoldenNoiseNetwork,
        conditioning: Conditioning,
        strength: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.prompt_embeds, self.pooled = prompt_of(conditioning)
        self.seed, self.noise, self.network = noise.seed, noise, network
        self.strength, self.device = strength, device

    def generate_noise(self, input_latent: dict[str, Any]) -> torch.Tensor:
        """The noise that came in, refined; where it was and in its number type."""
        noise = self.noise.generate_noise(input_latent)
        if self.strength == 0:
            return noise
        return refine(noise, self.network.to(self.device), self.prompt_embeds, self.pooled, self.strength, self.device)


def prompt_of(conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token and pooled embeddings of a CONDITIONING, which must hold one prompt."""
    if len(conditioning) != 1:
        raise ValueError(
            f"`conditioning` must hold one prompt, got {len(conditioning)}. Connect the prompt as it comes from its "
            "encoder, before prompts are combined or set to areas."
        )
    embeds, further = conditioning[0]
    return embeds, further.get("pooled_output")


def refine(
    noise: torch.Tensor,
    network: GoldenNoiseNetwork,
    prompt_embeds: torch.Tensor,
    pooled: torch.Tensor | None,
    strength: float,
    device: torch.device | str,
) -> torch.Tensor:
    """Refined noise `(batch, channels, height, width)`; of `(batch, channels, frames, ...)` each frame by itself."""
    if noise.is_nested or noise.ndim not in (4, 5):
        raise ValueError(
            "`noise` must be (batch, channels, height, width), or have frames behind the channels, got "
            f"{'several tensors' if noise.is_nested else tuple(noise.shape)}."
        )
    frames, pictures = noise.shape[2] if noise.ndim == 5 else 1, as_pictures(noise)
    texts = [
        None if rows is None else repeat_rows(rows, len(noise)).repeat_interleave(frames, 0).to(device)
        for rows in (prompt_embeds, pooled)
    ]
    golden = network.refine(pictures.to(device), texts[0], pooled_prompt_embeds=texts[1], scale=strength)
    return as_clips(golden, noise).to(noise)


def repeat_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """As many rows as there are pictures, from the first on and again, as ComfyUI's samplers repeat conditions."""
    return rows[[index % len(rows) for index in range(count)]]


class SpreadPredictions:
    """A wrapper of a MODEL's calls that moves predictions of the picture away from the prompt's mean one.

    It is `diversity_of="prediction"` of golden-noise pipelines in ComfyUI's terms: `apply_model(x, sigma, **c)` gives
    the predicted picture itself, and scales x for the model, so that what the model sees of the fixed noises is of
    unit variance when they are divided by that scale.

    Args:
        model_sampling: of the MODEL, with `calculate_input(sigma, x)`, linear in x.
        diversity: from 0 to 1.
        wrapped: the wrapper that the MODEL had.
    """

    def __init__(self, model_sampling: Any, diversity: float, wrapped: Callable[..., torch.Tensor] | None) -> None:
        self.model_sampling, self.diversity, self.wrapped = model_sampling, diversity, wrapped

    def __call__(self, apply_model: Callable[..., torch.Tensor], call: dict[str, Any]) -> torch.Tensor:
        """The predicted pictures of a call, spread apart; the first step is the one at the sampler's highest level."""
        x, sigma = call["input"], call["timestep"]

        def predict(x: torch.Tensor) -> torch.Tensor:
            if self.wrapped is not None:
                return self.wrapped(apply_model, {**call, "input": x})
            return apply_model(x, sigma, **call["c"])

        def predict_of_unit(noise: torch.Tensor) -> torch.Tensor:
            return predict((noise / scale).to(x)).float()

        levels = call["c"]["transformer_options"]["sample_sigmas"]
        scale = self.model_sampling.calculate_input(sigma.view(-1, *[1] * (x.ndim - 1)), torch.ones_like(x))
        picture, mean = predict(x), mean_prediction(predict_of_unit, x)
        spread = step_spread(self.diversity, bool(sigma.max() >= levels.max()))
        return (picture.float() + spread * (picture.float() - mean)).to(picture.dtype)


class GoldenNoise:
    """The node: noise in, noise out, for samplers that take a NOISE such as SamplerCustomAdvanced.

    With `diversity` the MODEL that comes out spreads the pictures of a prompt apart; it is the one that came in at 0.
    """

    CATEGORY = "sampling/custom_sampling/noise"
    DESCRIPTION = "Refines the noise of a seed for the prompt, by a network of diffusers_ext or a published NPNet."
    FUNCTION = "refine"
    RETURN_TYPES = ("NOISE", "MODEL")
    RETURN_NAMES = ("noise", "model")
    _networks: ClassVar[dict[str, GoldenNoiseNetwork]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[Any, ...]]]:  # noqa: N802
        """What ComfyUI shows and connects."""
        strength = {"default": 1.0, "min": -1.0, "max": 2.0, "step": 0.05}
        network = {"default": "user/network", "tooltip": "Folder, Hub name, or NPNet's file (.pth or .safetensors)."}
        return {
            "required": {
                "model": ("MODEL",),
                "conditioning": ("CONDITIONING",),
                "noise": ("NOISE",),
                "noise_model": ("STRING", network),
                "strength": ("FLOAT", strength),
            },
            "optional": {"diversity": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.05})},
        }

    def refine(
        self,
        model: Any,
        conditioning: Conditioning,
        noise: Noise,
        noise_model: str,
        strength: float,
        diversity: float = 0.0,
    ) -> tuple[RefinedNoise, Any]:
        """The node's function.

        Raises:
            ValueError: a network for latents of other channels than the model's, or for text of another width.
        """
        check_number("diversity", diversity, 0.0, 1.0)
        if noise_model not in self._networks:
            self._networks[noise_model] = load_noise_model(noise_model)
        network = self._networks[noise_model]
        check_fit(network, model, conditioning)
        golden = RefinedNoise(noise, network, conditioning, strength, getattr(model, "load_device", "cpu"))
        return golden, spread_model(model, diversity)


def spread_model(model: Any, diversity: float) -> Any:
    """A copy of the MODEL whose predictions are spread; the MODEL itself at 0."""
    if diversity == 0:
        return model
    spread = model.clone()
    before = spread.model_options.get("model_function_wrapper")
    wrapper = SpreadPredictions(spread.get_model_object("model_sampling"), diversity, before)
    spread.set_model_unet_function_wrapper(wrapper)
    return spread


def check_fit(network: GoldenNoiseNetwork, model: Any, conditioning: Conditioning) -> None:
    """Raise `ValueError` for a network made for other latents or other text than a MODEL has."""
    embeds, pooled = prompt_of(conditioning)
    channels = getattr(model.get_model_object("latent_format"), "latent_channels", None)
    width = (embeds if not network.config.get("pooled_text") else pooled).shape[-1]
    for name, size in (("in_channels", channels), ("text_embed_dim", width)):
        if size is not None and network.config.get(name, size) != size:
            raise ValueError(
                f"`noise_model` must have `{name}` {size} like the model and its prompt, got {network.config[name]}."
            )
