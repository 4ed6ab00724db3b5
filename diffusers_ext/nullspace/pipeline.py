"""Stable Diffusion and SDXL pipelines that carry the statistics a null-space LoRA was trained under."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_ext.core.attention_processors import ProjectAttnProcessor, use_processors
from diffusers_ext.core.pipelines import add_component, plain_class_name
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.hub.push import PushWithCard
from diffusers_ext.nullspace.lora_files import LORA_WEIGHT_NAME, add_kohya_file, check_loaded_lora
from diffusers_ext.nullspace.projector import NullSpaceProjector
from diffusers_ext.nullspace.statistics import FeatureStatistics

logger = logging.getLogger(__name__)


class NullSpaceMixin(PushWithCard):
    """What both pipelines add: a `statistics` component, checked LoRAs, preservation at run time.

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
        """As in diffusers, and `comfyui_a1111_kohya.safetensors` beside it, whose names ComfyUI and A1111 know.

        Under a `weight_name` of one's own, or as a pickle, there is no second file.
        """
        save = super().save_lora_weights
        save(save_directory, *args, **kwargs)
        given = inspect.signature(save).bind(save_directory, *args, **kwargs).arguments
        usual = given.get("weight_name") in (None, LORA_WEIGHT_NAME)
        if usual and given.get("safe_serialization", True) and given.get("is_main_process", True):
            add_kohya_file(save_directory)

    @contextmanager
    def preserve(
        self, strength: float = 1.0, *, projector: NullSpaceProjector | None = None, **criterion: float
    ) -> Iterator[ProjectAttnProcessor]:
        """Project whatever LoRA is loaded away from the preserved prompts, while the context is open.

        Args:
            strength: 0 is the LoRA as it is, 1 fully projected; settable on the yielded processor.
            projector: in place of `criterion`, one of `NullSpaceProjector.from_statistics` (`damping=1e-3`).
        """
        if projector is None:
            if self.statistics is None:
                raise ValueError("`statistics` must be loaded to preserve them, got none.")
            criterion = criterion or {"damping": 1e-3}
            projector = NullSpaceProjector.from_statistics(self.statistics, **criterion)
        _warn_of_uncovered(self.unet, projector)
        processor = ProjectAttnProcessor(strength=strength, projector=projector.projections())
        with use_processors(self.unet, processor):
            yield processor


def _warn_of_uncovered(unet: torch.nn.Module, projector: NullSpaceProjector) -> None:
    adapted = [name for name, part in unet.named_modules() if isinstance(part, BaseTunerLayer)]
    in_attention = [name.removesuffix("processor") for name in unet.attn_processors]
    left = [name for name in adapted if name not in projector.sources or not name.startswith(tuple(in_attention))]
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
