"""Stable Diffusion and SDXL pipelines that start from noise which suits the prompt."""

from __future__ import annotations

from typing import ClassVar

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

from diffusers_ext.golden_noise.pipeline_mixin import (
    GoldenNoiseMixin,
    NetworkSizes,
    NoiseModel,
)


class GoldenNoisePipeline(GoldenNoiseMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""

    model_cpu_offload_seq = "text_encoder->image_encoder->noise_model->unet->vae"
    _optional_components = [*StableDiffusionPipeline._optional_components, "noise_model"]

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
        noise_model: NoiseModel | None = None,
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
        self.set_noise_model(noise_model)

    def _sizes(self) -> NetworkSizes | None:
        if self.unet is None:
            return None
        config = self.unet.config
        return NetworkSizes(config.in_channels, config.cross_attention_dim)


class GoldenNoiseXLPipeline(GoldenNoiseMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->noise_model->unet->vae"
    _optional_components = [*StableDiffusionXLPipeline._optional_components, "noise_model"]
    _text_outputs: ClassVar[dict[str, int]] = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}

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
        noise_model: NoiseModel | None = None,
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
        self.set_noise_model(noise_model)

    def _sizes(self) -> NetworkSizes | None:
        if self.unet is None:
            return None
        config = self.unet.config
        # The UNet adds the pooled text to the embeddings of six numbers: sizes and crop.
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return NetworkSizes(config.in_channels, config.cross_attention_dim, pooled)
