"""Pipelines of diffusers that carry the statistics a null-space LoRA was trained under."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    ChromaPipeline,
    DiffusionPipeline,
    Flux2KleinPipeline,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
    ZImagePipeline,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_ext.core.attention_processors import ProjectAttnProcessor, use_processors
from diffusers_ext.core.pipelines import add_component, denoiser_of, plain_class_name
from diffusers_ext.core.restored_state import CallScope
from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from diffusers_ext.families import match_family
from diffusers_ext.families.lora_files import add_second_file, check_loaded_lora
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.hub.push import PushWithCard
from diffusers_ext.hub.saved_pipelines import ReadAlike
from diffusers_ext.nullspace.projector import NullSpaceProjector
from diffusers_ext.nullspace.statistics import FeatureStatistics

logger = logging.getLogger(__name__)


class NullSpaceMixin(ReadAlike, PushWithCard):
    """What all of them add: a `statistics` component, checked LoRAs, preservation at run time.

    The facts for the model card of an upload are the arguments of `subject_pipeline_card`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if NullSpaceMixin in cls.__bases__:
            add_component(cls, "statistics", FeatureStatistics)

    def _card(self, *, token: str | None, **facts: Any) -> Callable[..., Card]:
        if adapters := sorted(_adapters(self)):
            raise ValueError(
                f"A pipeline to upload must have no LoRA loaded, got {adapters}: its files would not "
                "load. Upload the LoRA by `push_lora`, or fuse it and `unload_lora_weights()` first."
            )
        return subject_pipeline_card(self, token=token, **facts)

    def load_statistics(self, pretrained_model_name_or_path: str, **kwargs: object) -> None:
        """Load `FeatureStatistics` from a folder or the Hub and check that they are of this model."""
        self.set_statistics(FeatureStatistics.from_pretrained(pretrained_model_name_or_path, **kwargs))

    def set_statistics(self, statistics: FeatureStatistics | None) -> None:
        """Make `statistics` a component, so that `save_pretrained` and `push_to_hub` include it."""
        if statistics is not None:
            if not isinstance(statistics, FeatureStatistics):
                raise TypeError(
                    "`statistics` must be FeatureStatistics, got a "
                    f"{type(statistics).__name__}. Use `load_statistics` for a folder or Hub name."
                )
            statistics.check_pipeline(self)
        self.register_modules(statistics=statistics)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        **kwargs: object,
    ) -> None:
        """As in diffusers, but a LoRA without any effect on this model is a `ValueError`."""
        before = _adapters(self)
        models = [part for part in self.components.values() if isinstance(part, torch.nn.Module)]
        layers = [part for model in models for part in model.modules() if isinstance(part, BaseTunerLayer)]
        active = [(layer, list(layer.active_adapters)) for layer in layers]
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name, **kwargs)
        added = _adapters(self) - before
        try:
            check_loaded_lora(self, adapter_name or min(added, default="none was added"))
        except ValueError:
            for layer, names in active:
                layer.set_adapter(names)
            self.delete_adapters(sorted(added))
            raise

    @classmethod
    def save_lora_weights(cls, save_directory: str | os.PathLike, *args: object, **kwargs: object) -> None:
        """As in diffusers, and beside it a file whose names ComfyUI and A1111 know, where these are others.

        It is `comfyui_a1111_kohya.safetensors` of a UNet, `comfyui.safetensors` of some transformers. Under a
        `weight_name` of one's own, or as a pickle, there is no second file.
        """
        save = super().save_lora_weights
        save(save_directory, *args, **kwargs)
        given = inspect.signature(save).bind(save_directory, *args, **kwargs).arguments
        usual = given.get("weight_name") in (None, LORA_WEIGHT_NAME)
        if usual and given.get("safe_serialization", True) and given.get("is_main_process", True):
            add_second_file(save_directory, cls)

    @contextmanager
    def preserve(
        self, strength: float = 1.0, *, projector: NullSpaceProjector | None = None, **criterion: float
    ) -> Iterator[ProjectAttnProcessor]:
        """Project whatever LoRA is loaded away from the preserved prompts, while the context is open.

        Of a transformer, the LoRAs that are loaded when it is opened.

        Args:
            strength: 0 is the LoRA as it is, 1 fully projected; settable on the yielded processor.
            projector: in place of `criterion`, one of `NullSpaceProjector.from_statistics` (`damping=1e-3`).
        """
        if projector is None:
            if self.statistics is None:
                raise ValueError("`statistics` must be loaded to preserve them, got none.")
            criterion = criterion or {"damping": 1e-3}
            projector = NullSpaceProjector.from_statistics(self.statistics, **criterion)
        denoiser, everywhere = denoiser_of(self), match_family(self).flow_matching
        _warn_of_uncovered(denoiser, projector, everywhere)
        processor = ProjectAttnProcessor(strength=strength, projector=projector.projections())
        with _project_loras(denoiser, processor) if everywhere else use_processors(denoiser, processor):
            yield processor


@contextmanager
def _project_loras(denoiser: torch.nn.Module, processor: ProjectAttnProcessor) -> Iterator[None]:
    """What the processor does in attention layers, for the LoRA of any Linear."""
    with CallScope() as scope, ExitStack() as hooks:
        for name, layer in denoiser.named_modules():
            if isinstance(layer, LoraLinear) and name in processor.projections:
                for a in layer.lora_A.values():
                    project = partial(_project_input, processor, name, scope)
                    hooks.callback(a.register_forward_pre_hook(project).remove)
        yield


def _project_input(
    processor: ProjectAttnProcessor, name: str, scope: CallScope, _: torch.nn.Module, args: tuple
) -> tuple | None:
    if not processor.strength or not scope.covers_this_call():
        return None
    features = args[0]
    projected = features @ processor.projections[name].to(features)
    return (features + processor.strength * (projected - features),)


def _warn_of_uncovered(denoiser: torch.nn.Module, projector: NullSpaceProjector, everywhere: bool) -> None:
    adapted = [name for name, part in denoiser.named_modules() if isinstance(part, BaseTunerLayer)]
    within = ("",) if everywhere else tuple(name.removesuffix("processor") for name in denoiser.attn_processors)
    left = [name for name in adapted if name not in projector.sources or not name.startswith(within)]
    if left:
        logger.warning(
            "%d modules of the loaded LoRAs are not projected, because the statistics do not cover "
            "them or they are not in attention layers. The first is %s.",
            len(left),
            left[0],
        )


def _adapters(pipeline: DiffusionPipeline) -> set[str]:
    return {name for names in pipeline.get_list_adapters().values() for name in names}


class NullSpaceDreamBoothPipeline(NullSpaceMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with an optional `statistics` component, and what `NullSpaceMixin` adds."""


class NullSpaceDreamBoothXLPipeline(NullSpaceMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with an optional `statistics` component, and what `NullSpaceMixin` adds."""


class NullSpaceDreamBoothSD3Pipeline(NullSpaceMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with an optional `statistics` component, and what `NullSpaceMixin` adds."""


class NullSpaceDreamBoothFluxPipeline(NullSpaceMixin, FluxPipeline):
    """`FluxPipeline` with an optional `statistics` component, and what `NullSpaceMixin` adds."""


class NullSpaceDreamBoothFlux2KleinPipeline(NullSpaceMixin, Flux2KleinPipeline):
    """`Flux2KleinPipeline` with an optional `statistics` component, and what `NullSpaceMixin` adds."""


class NullSpaceDreamBoothChromaPipeline(NullSpaceMixin, ChromaPipeline):
    """`ChromaPipeline` with an optional `statistics` component, and what `NullSpaceMixin` adds."""


class NullSpaceDreamBoothAuraFlowPipeline(NullSpaceMixin, AuraFlowPipeline):
    """`AuraFlowPipeline` with an optional `statistics` component, and what `NullSpaceMixin` adds."""


class NullSpaceDreamBoothQwenImagePipeline(NullSpaceMixin, QwenImagePipeline):
    """`QwenImagePipeline` with an optional `statistics` component, and what `NullSpaceMixin` adds."""


class NullSpaceDreamBoothZImagePipeline(NullSpaceMixin, ZImagePipeline):
    """`ZImagePipeline` with an optional `statistics` component, and what `NullSpaceMixin` adds."""


class NullSpaceDreamBoothWanPipeline(NullSpaceMixin, WanPipeline):
    """`WanPipeline` with an optional `statistics` component, and what `NullSpaceMixin` adds."""


def subject_pipeline_card(
    pipeline: DiffusionPipeline,
    *,
    instance_prompt: str | None = None,
    base_model: str | None = None,
    statistics: bool | None = None,
    **common: Any,
) -> Callable[..., Card]:
    """The card of whole weights, with the statistics they were trained under where there are any, as of `make_card`.

    Args:
        base_model: Hub name; where the statistics, or else the pipeline, came from when `None`.
        statistics: whether the repository has `statistics/`; as the pipeline has them when `None`.
    """
    component = getattr(pipeline, "statistics", None)
    if not base_model and component is not None:
        base_model = component.facts.get("base_model")
    if not base_model:
        source = pipeline.config.get("_name_or_path")
        # A folder may well be the trained pipeline itself.
        base_model = source if source and not Path(source).exists() else None
    return make_card(
        "subject_pipeline",
        base_model=base_model,
        instance_prompt=instance_prompt,
        pipeline=plain_class_name(pipeline),
        statistics=component is not None if statistics is None else statistics,
        **common,
    )
