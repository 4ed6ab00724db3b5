"""Stable Diffusion and SDXL pipelines that carry the statistics a null-space LoRA was trained under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from diffusers_ext.core.processors import ProjectAttnProcessor, use_processors
from diffusers_ext.nullspace.lora_files import check_loaded_lora
from diffusers_ext.nullspace.projector import NullSpaceProjector
from diffusers_ext.nullspace.statistics import FeatureStatistics


class NullSpaceMixin:
    """What both pipelines add: a `statistics` component, checked LoRAs, preservation at run time."""

    def load_statistics(self, pretrained_model_name_or_path: str, **kwargs: object) -> None:
        """Load `FeatureStatistics` from a folder or the Hub and check that they are of this model."""
        self.set_statistics(
            FeatureStatistics.from_pretrained(pretrained_model_name_or_path, **kwargs)
        )

    def set_statistics(self, statistics: FeatureStatistics | None) -> None:
        """Make `statistics` a component, so that `save_pretrained` and `push_to_hub` include it."""
        if statistics is not None:
            statistics.check_pipeline(self)
        self.register_modules(statistics=statistics)

    def load_lora_weights(
        self, *args: object, adapter_name: str | None = None, **kwargs: object
    ) -> None:
        """As in diffusers, but a LoRA without any effect on this model is a `ValueError`."""
        super().load_lora_weights(*args, adapter_name=adapter_name, **kwargs)
        check_loaded_lora(self, adapter_name)

    @contextmanager
    def preserve(
        self,
        strength: float = 1.0,
        *,
        projector: NullSpaceProjector | None = None,
        **criterion: float,
    ) -> Iterator[ProjectAttnProcessor]:
        """Project whatever LoRA is loaded away from the preserved prompts, while the context is open.

        Args:
            strength: 0 is the LoRA as it is, 1 fully projected; settable on the yielded processor.
            projector: ready projector, in place of `criterion`.
            criterion: one of `NullSpaceProjector.from_statistics`; `damping=1e-3` by default.

        Raises:
            ValueError: no statistics, or a fused LoRA.
        """
        if projector is None:
            if self.statistics is None:
                raise ValueError("`statistics` must be loaded to preserve them, got none.")
            criterion = criterion or {"damping": 1e-3}
            projector = NullSpaceProjector.from_statistics(self.statistics, **criterion)
        processor = ProjectAttnProcessor(strength=strength, projector=projector.projections())
        with use_processors(self.unet, processor):
            yield processor


class NullSpaceDreamBoothPipeline(NullSpaceMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with an optional `statistics` component.

    Loads from a plain base model too; see `NullSpaceMixin` for what it adds.
    """

    _optional_components = [*StableDiffusionPipeline._optional_components, "statistics"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker = None,
        feature_extractor: CLIPImageProcessor = None,
        image_encoder: CLIPVisionModelWithProjection = None,
        statistics: FeatureStatistics | None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self.set_statistics(statistics)


class NullSpaceDreamBoothXLPipeline(NullSpaceMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with an optional `statistics` component.

    Loads from a plain base model too; see `NullSpaceMixin` for what it adds.
    """

    _optional_components = [*StableDiffusionXLPipeline._optional_components, "statistics"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        statistics: FeatureStatistics | None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        super().__init__(
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer_2,
            unet,
            scheduler,
            image_encoder,
            feature_extractor,
            force_zeros_for_empty_prompt,
            add_watermarker,
        )
        self.set_statistics(statistics)
