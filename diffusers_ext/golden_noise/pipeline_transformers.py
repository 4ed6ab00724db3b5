"""Hunyuan-DiT, SD3 and Flux pipelines that start from noise which suits the prompt."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    BertModel,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionModel,
    T5EncoderModel,
    T5Tokenizer,
    T5TokenizerFast,
)

from diffusers_ext.golden_noise.pipeline_mixin import (
    GoldenNoiseMixin,
    NetworkSizes,
    NoiseModel,
)


class GoldenNoiseHunyuanDiTPipeline(GoldenNoiseMixin, HunyuanDiTPipeline):
    """`HunyuanDiTPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`.

    The network reads the first encoder's (BERT) text with its mask.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->noise_model->transformer->vae"
    _optional_components = [*HunyuanDiTPipeline._optional_components, "noise_model"]
    _text_outputs: ClassVar[dict[str, int]] = {"prompt_embeds": 0, "attention_mask": 2}

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: BertModel,
        tokenizer: BertTokenizer,
        transformer: HunyuanDiT2DModel,
        scheduler: DDPMScheduler,
        safety_checker: StableDiffusionSafetyChecker = None,
        feature_extractor: CLIPImageProcessor = None,
        requires_safety_checker: bool = True,
        text_encoder_2: T5EncoderModel | None = None,
        tokenizer_2: T5Tokenizer | None = None,
        noise_model: NoiseModel | None = None,
    ) -> None:
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            transformer,
            scheduler,
            safety_checker,
            feature_extractor,
            requires_safety_checker,
            text_encoder_2,
            tokenizer_2,
        )
        self.set_noise_model(noise_model)

    def _network_text(
        self, encoded: tuple[torch.Tensor | None, ...], arguments: dict[str, Any]
    ) -> dict[str, torch.Tensor | None]:
        text = super()._network_text(encoded, arguments)
        images, mask = arguments["num_images_per_prompt"], text["attention_mask"]
        prompts = len(text["prompt_embeds"]) // images
        # The embeddings repeat image by image; diffusers repeats the masks of its own prompts as a
        # whole, and given ones not at all.
        if arguments["prompt"] is not None or len(mask) == prompts:
            text["attention_mask"] = mask[:prompts].repeat_interleave(images, 0)
        return text

    def _sizes(self) -> NetworkSizes | None:
        if self.transformer is None:
            return None
        config = self.transformer.config
        return NetworkSizes(config.in_channels, config.cross_attention_dim)


class GoldenNoiseSD3Pipeline(GoldenNoiseMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""

    model_cpu_offload_seq = (
        "text_encoder->text_encoder_2->text_encoder_3->image_encoder->noise_model->transformer->vae"
    )
    _optional_components = [*StableDiffusion3Pipeline._optional_components, "noise_model"]
    _text_outputs: ClassVar[dict[str, int]] = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: T5EncoderModel,
        tokenizer_3: T5TokenizerFast,
        image_encoder: SiglipVisionModel = None,
        feature_extractor: SiglipImageProcessor = None,
        noise_model: NoiseModel | None = None,
    ) -> None:
        super().__init__(
            transformer,
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            text_encoder_3,
            tokenizer_3,
            image_encoder,
            feature_extractor,
        )
        self.set_noise_model(noise_model)

    def _golden_latents(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return self._refine(latents.float()).to(latents.dtype)

    def _sizes(self) -> NetworkSizes | None:
        if self.transformer is None:
            return None
        config = self.transformer.config
        return NetworkSizes(
            config.in_channels, config.joint_attention_dim, config.pooled_projection_dim
        )


class GoldenNoiseFluxPipeline(GoldenNoiseMixin, FluxPipeline):
    """`FluxPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`.

    The network reads the T5 text and sees the latents unpacked.
    """

    model_cpu_offload_seq = (
        "text_encoder->text_encoder_2->image_encoder->noise_model->transformer->vae"
    )
    _optional_components = [*FluxPipeline._optional_components, "noise_model"]
    _text_outputs: ClassVar[dict[str, int]] = {"prompt_embeds": 0, "pooled_prompt_embeds": 1}

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        noise_model: NoiseModel | None = None,
    ) -> None:
        super().__init__(
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            transformer,
            image_encoder,
            feature_extractor,
        )
        self.set_noise_model(noise_model)

    def _golden_latents(
        self, latents: tuple[torch.Tensor, torch.Tensor], height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed, image_ids = latents
        noise = self._unpack_latents(packed, height, width, self.vae_scale_factor)
        golden = self._refine(noise.float())
        return self._pack_latents(golden, *golden.shape).to(packed.dtype), image_ids

    def _sizes(self) -> NetworkSizes | None:
        if self.transformer is None:
            return None
        config = self.transformer.config
        return NetworkSizes(
            config.in_channels // 4, config.joint_attention_dim, config.pooled_projection_dim
        )
