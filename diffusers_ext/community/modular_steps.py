"""Steps of modular pipelines that hold while the denoiser runs: an eraser, and a LoRA projected by a dial."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.modular_pipelines import ConfigSpec, InputParam, ModularPipeline, ModularPipelineBlocks, PipelineState
from peft.tuners.lora import LoraLayer

from diffusers_ext.core.attention_processors import ProjectAttnProcessor, use_processors
from diffusers_ext.core.call_arguments import check_number
from diffusers_ext.core.modular import DenoisingStep
from diffusers_ext.eraser.adapter.outputs import eraser_scaled
from diffusers_ext.eraser.files import load_eraser
from diffusers_ext.families import FAMILIES, find_modular_family
from diffusers_ext.nullspace.projector import NullSpaceProjector
from diffusers_ext.nullspace.statistics import FeatureStatistics

ERASER, LORA = "eraser_step", "null_space_lora"  # names of the adapters
_LOADING = threading.Lock()


class EraserStep(DenoisingStep):
    """Draw without a concept: `eraser`, a setting of the pipeline, names it, `eraser_scale` of a call is how strongly.

    It is loaded by the first call that needs it, beside adapters that are there, acts in this pipeline's denoising,
    and is off for all else that shares the denoiser.
    """

    name = "eraser"

    @property
    def description(self) -> str:
        """In a sentence, for the pipeline's help and card."""
        return "Eraser: takes the concept out of the denoiser that `eraser`, a folder or Hub name, was trained on."

    def own_configs(self) -> list[ConfigSpec]:
        """The eraser."""
        return [ConfigSpec("eraser", None, "Folder or Hub name.")]

    def own_inputs(self) -> list[InputParam]:
        """The strength."""
        description = "Strength of the eraser; 0 is the plain pipeline."
        return [InputParam("eraser_scale", type_hint=float, default=1.0, description=description)]

    def extend(self, blocks: ModularPipelineBlocks) -> None:
        """Go around every denoising loop of a family that erasers attach to."""
        attached = [family for family in FAMILIES if family.joint_attention is not None]
        # Its two transformers have a part of the eraser each.
        known = [name for family in attached for name in family.modular_blocks if name != "Wan22Blocks"]
        if type(blocks).__name__ not in known:
            raise ValueError(f"`base` must be one of {known} for an eraser, got {type(blocks).__name__!r}.")
        super().extend(blocks)

    @contextmanager
    def around(self, components: ModularPipeline, state: PipelineState) -> Iterator[None]:
        """The eraser at the call's scale, in the calling thread alone."""
        scale, eraser = check_number("eraser_scale", state.get("eraser_scale"), 0.0), components.config["eraser"]
        denoiser = getattr(components, find_modular_family(components).denoiser)
        if eraser is None or not scale:
            yield
            return
        name = adapter_name(ERASER, eraser)  # pipelines that share a denoiser may have different ones
        with _LOADING:
            if name not in getattr(denoiser, "peft_config", {}):
                load_eraser(denoiser, eraser, adapter_name=name, scale=0.0)  # so that others never see it
        with eraser_scaled(denoiser, name, scale):
            yield


class NullSpaceLoraStep(DenoisingStep):
    """Draw with a LoRA, and with less of what it does to prompts that it is not about, by a dial of the call.

    Settings of the pipeline are `lora`, loaded by the first call (`None` where LoRAs are loaded already), `statistics`
    of what is to stay, and `damping` of the projection. `projection_strength` of a call goes from 0, the LoRA as it
    is, to 1, as `debleed_lora` writes it. Weights stay as they are.
    """

    name = "null_space_lora"
    _projector: tuple[tuple[str, float], dict[str, torch.Tensor]] | None = None

    @property
    def description(self) -> str:
        """In a sentence, for the pipeline's help and card."""
        return "Null-space LoRA: `lora`, projected at run time onto what the prompts of `statistics` leave unused."

    def own_configs(self) -> list[ConfigSpec]:
        """The LoRA, the statistics, and how strictly they are read."""
        return [
            ConfigSpec("lora", None, "Folder, file or Hub name; None for LoRAs that are loaded."),
            ConfigSpec("statistics", None, "Folder or Hub name of feature statistics."),
            ConfigSpec("damping", 1e-3, "The smaller, the more is taken out."),
        ]

    def own_inputs(self) -> list[InputParam]:
        """The dial."""
        description = "How much of the projection is taken, in [0, 1]; 0 is the LoRA as it is."
        return [InputParam("projection_strength", type_hint=float, default=1.0, description=description)]

    @contextmanager
    def around(self, components: ModularPipeline, state: PipelineState) -> Iterator[None]:
        """The LoRAs of the denoiser's attention, projected."""
        strength = check_number("projection_strength", state.get("projection_strength"), 0.0, 1.0)
        config = components.config
        denoiser = getattr(components, find_modular_family(components).denoiser)
        if config["lora"] is not None:
            load_lora_once(components, denoiser, config["lora"])
        if not strength or config["statistics"] is None:
            yield
            return
        projections = self.projections(config["statistics"], config["damping"])
        check_covered(denoiser, projections)
        with use_processors(denoiser, ProjectAttnProcessor(strength, projector=projections), layers_of(projections)):
            yield

    def projections(self, statistics: str, damping: float) -> dict[str, torch.Tensor]:
        """By the names of the Linears; kept until another setting is asked for."""
        if self._projector is None or self._projector[0] != (statistics, damping):
            found = NullSpaceProjector.from_statistics(FeatureStatistics.from_pretrained(statistics), damping=damping)
            self._projector = (statistics, damping), found.projections()
        return self._projector[1]


def adapter_name(kind: str, source: str) -> str:
    """The name of what a step loads, another one for each source."""
    return f"{kind}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def load_lora_once(components: ModularPipeline, denoiser: torch.nn.Module, lora: str) -> None:
    """Load a LoRA unless the denoiser has it; `ValueError` where it has that of another pipeline's step."""
    name = adapter_name(LORA, lora)
    with _LOADING:
        there = [other for other in getattr(denoiser, "peft_config", {}) if other.startswith(f"{LORA}_")]
        if there and name not in there:
            raise ValueError(
                f"`lora` must be the one that this denoiser has by the step of another pipeline, got {lora!r}. Give "
                "this pipeline a denoiser of its own, or take the other LoRA off: `unload_lora_weights()`."
            )
        if not there:
            components.load_lora_weights(lora, adapter_name=name)


def layers_of(projections: dict[str, torch.Tensor]) -> list[str]:
    """Names of the attention layers that hold Linears such as `...attn2.to_k` or `...attn2.to_out.0`."""
    attention = (name.removesuffix(".0").rpartition(".")[0] for name in projections)
    return sorted({name for name in attention if "att" in name.rpartition(".")[2]})


def check_covered(denoiser: torch.nn.Module, projections: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` for a LoRA on Linears that no projection reaches."""
    layers = layers_of(projections)
    for name, module in denoiser.named_modules():
        if isinstance(module, LoraLayer):
            reached = name in projections and any(name.startswith(f"{layer}.") for layer in layers)
            if not reached:
                raise ValueError(
                    "`statistics` must cover every Linear that the LoRA changes, and these must be of attentions, got "
                    f"{name!r}. Collect more features, or project the LoRA's file by `debleed_lora`."
                )
