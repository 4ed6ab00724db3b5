"""Golden noise in modular pipelines of diffusers: steps after the one that draws the noise and around denoising."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
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

from diffusers_ext.core.call_arguments import check_number
from diffusers_ext.core.modular import DenoisingStep, ExtensionStep
from diffusers_ext.families import FAMILIES, Family, find_modular_family
from diffusers_ext.families.family import import_class
from diffusers_ext.golden_noise.diversity import check_way, spread_pictures
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork
from diffusers_ext.golden_noise.pipelines import check_sizes, refined_latents

# Steps whose latents are noise and nothing else; others mix a picture in.
_DRAWS_NOISE = re.compile(r"(?!.*(Img2Img|Inpaint))\w+PrepareLatentsStep")


class GoldenNoiseStep(ExtensionStep):
    """Refine the noise of a modular pipeline for its prompt, by a component `noise_model`.

    It stands behind the steps that draw noise (`ExtendedBlocks(base, [GoldenNoiseStep])` puts it there), and changes
    nothing without a `noise_model` or with `golden_noise_scale=0`. Clips of Wan are refined latent frame by latent
    frame, as the networks know pictures. A `DiversityStep` comes with it, around the denoising, where the family has
    the dial.
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
        if any(type(blocks).__name__ in family.modular_blocks and family.golden_pipeline for family in FAMILIES):
            DiversityStep().extend(blocks)

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        """Refine the state's `latents`."""
        block_state = self.get_block_state(state)
        scale, network = check_number("golden_noise_scale", block_state.golden_noise_scale), components.noise_model
        if network is not None and scale != 0:
            family = find_modular_family(components)
            check_sizes(network, family, getattr(components, family.denoiser).config, type(components).__name__)
            block_state.latents = refined_latents(
                _AsPipeline(components, family), family, network, block_state.latents,
                (block_state.height, block_state.width), family.modular_text(state), scale,
            )  # fmt: skip
            self.set_block_state(state, block_state)
        return components, state


class DiversityStep(DenoisingStep):
    """Spread the pictures of a prompt apart while they are drawn: the dial `diversity` of golden-noise pipelines."""

    name = "diversity"

    @property
    def description(self) -> str:
        """In a sentence, for the pipeline's help and card."""
        return "Diversity: a dial of the call spreads the pictures of a prompt apart."

    def own_inputs(self) -> list[InputParam]:
        """The dial, and what it moves."""
        return [
            InputParam(
                "diversity",
                type_hint=float,
                default=0.0,
                description="How far pictures of one prompt are spread apart, from 0, the plain pipeline, to 1.",
            ),
            InputParam(
                "diversity_of",
                type_hint=str,
                default="prediction",
                description='By what: "prediction" (eight more calls of the denoiser each time), "prompt" or "both".',
            ),
        ]

    @contextmanager
    def around(self, components: ModularPipeline, state: PipelineState) -> Iterator[None]:
        """The denoiser's predictions, or the prompt it reads, moved in the calling thread."""
        diversity = check_number("diversity", state.get("diversity"), 0.0, 1.0)
        way = check_way(state.get("diversity_of"))
        with spread_pictures(components, find_modular_family(components), diversity, way):
            yield


class _AsPipeline:
    """A modular pipeline with the methods of the family's pipeline that know its latents and its conditions."""

    def __init__(self, components: ModularPipeline, family: Family) -> None:
        self._components, self._class = components, import_class(family.pipelines[0])

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._components, name):
            return getattr(self._components, name)
        found = inspect.getattr_static(self._class, name)
        return found.__get__(self, self._class) if hasattr(found, "__get__") else found
