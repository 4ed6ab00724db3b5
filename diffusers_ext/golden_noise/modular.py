"""Golden noise in modular pipelines of diffusers: a step after the one that draws the noise."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    ModularPipeline,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
)

from diffusers_ext.core.modular import ExtensionStep
from diffusers_ext.families import FAMILIES, Family, find_modular_family
from diffusers_ext.families.family import import_class
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork
from diffusers_ext.golden_noise.pipelines import check_scale, check_sizes, refined_latents

# Steps whose latents are noise and nothing else; others mix a picture in.
_DRAWS_NOISE = re.compile(r"(?!.*(Img2Img|Inpaint))\w+PrepareLatentsStep")


class GoldenNoiseStep(ExtensionStep):
    """Refine the noise of a modular pipeline for its prompt, by a component `noise_model`.

    It stands behind the steps that draw noise (`ExtendedBlocks(base, [GoldenNoiseStep])` puts it there), and changes
    nothing without a `noise_model` or with `golden_noise_scale=0`. Clips of Wan are refined latent frame by latent
    frame, as the networks know pictures.
    """

    name = "golden_noise"

    @property
    def description(self) -> str:
        """In a sentence, for the pipeline's help and card."""
        return (
            "Golden noise: a small network, `noise_model`, turns the noise of a seed into one that suits the prompt."
        )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The network, of any class."""
        return [ComponentSpec("noise_model", GoldenNoiseNetwork)]

    @property
    def inputs(self) -> list[InputParam]:
        """Noise, size and text as the steps before leave them, and the strength."""
        read = ("latents", "height", "width", "prompt_embeds")
        return [
            *(InputParam(name) for name in read),
            InputParam(
                "golden_noise_scale",
                type_hint=float,
                default=1.0,
                description="How much of the network's change of the noise is taken; 0 is the plain pipeline.",
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The refined noise."""
        return [OutputParam("latents", type_hint=torch.Tensor, description="The noise to be denoised.")]

    def extend(self, blocks: ModularPipelineBlocks) -> None:
        """Stand behind every step that draws noise alone."""
        known = [name for family in FAMILIES for name in family.modular_blocks]
        if type(blocks).__name__ not in known:
            raise ValueError(f"`base` must be one of {known} for golden noise, got {type(blocks).__name__!r}.")
        self.after(blocks, lambda block: bool(_DRAWS_NOISE.fullmatch(type(block).__name__)))

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        """Refine the state's `latents`."""
        block_state = self.get_block_state(state)
        scale, network = check_scale(block_state.golden_noise_scale), components.noise_model
        if network is not None and scale != 0:
            family = find_modular_family(components)
            check_sizes(network, family, getattr(components, family.denoiser).config, type(components).__name__)
            block_state.latents = refined_latents(
                _AsPipeline(components, family), family, network, block_state.latents,
                (block_state.height, block_state.width), family.modular_text(state), scale,
            )  # fmt: skip
            self.set_block_state(state, block_state)
        return components, state


class _AsPipeline:
    """A modular pipeline with the methods of the family's pipeline that know its latents and its conditions."""

    def __init__(self, components: ModularPipeline, family: Family) -> None:
        self._components, self._class = components, import_class(family.pipelines[0])

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._components, name):
            return getattr(self._components, name)
        found = inspect.getattr_static(self._class, name)
        return found.__get__(self, self._class) if hasattr(found, "__get__") else found
